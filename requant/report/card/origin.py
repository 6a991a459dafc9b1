"""The origin of a model in a GGUF's metadata, for a model card: name, repositories, licence, languages, tags.

Keys: general.* of gguf-py's constants.py. Licences: the identifiers in the Hugging Face Hub's documentation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from requant.container.metadata import Metadata
from requant.model.kinds import LANGUAGE_MODEL, kind_of

MOST_TAGS, MOST_LANGUAGES = 20, 50
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
_ON_HUB = re.compile(rf"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/({REPOSITORY.pattern})/?", re.I)
_URL = re.compile(r"https?://[\x21-\x7e]{1,500}", re.I)
_LONGEST = 200  # characters of a tag or a licence's name
_OTHER = "other"
_LICENCES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 gemma unknown other
    """.split()  # noqa: SIM905, read better so
)


@dataclass(frozen=True, slots=True)
class ModelOrigin:
    """The origin of a model; unknown fields are empty.

    repositories: of this model on the Hugging Face Hub; parents: repositories of the models it was made from.
    """

    name: str = ""
    author: str = ""
    repositories: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    writes_text: bool = True


@dataclass(frozen=True, slots=True)
class CardOverrides:
    """Facts of the model and its repository that the user gives; they replace those of the metadata."""

    base_models: tuple[str, ...] = ()
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    quantized_by: str = ""
    repository: str = ""


def read_origin(metadata: Metadata) -> ModelOrigin:
    """Read the origin from metadata; values of an unexpected type count as missing."""
    reader = _MetadataReader(metadata)
    name = reader.text("general.name") or " ".join(
        part for key in ("basename", "finetune", "size_label") if (part := reader.text(f"general.{key}"))
    )
    own = ("general.source.repo_url", "general.source.url", "general.repo_url", "general.url")
    named = [*map(reader.repository, own), reader.text("general.source.huggingface.repository")]
    repositories = dict.fromkeys(name for name in named if REPOSITORY.fullmatch(name))
    count = metadata.get("general.base_model.count", 0)
    n = min(count, MOST_TAGS) if type(count) is int else 0
    urls = (f"general.base_model.{i}.repo_url" for i in range(n))
    parents = dict.fromkeys(filter(None, map(reader.repository, urls)))
    for parent in list(parents):
        if _slug(parent.partition("/")[2]) == _slug(name):  # a copy of this model under another owner's name
            repositories.setdefault(parent)
            del parents[parent]
    arch = reader.text("general.architecture")
    causal = metadata.get(f"{arch}.attention.causal", True) is not False
    return ModelOrigin(
        name=name,
        author=reader.text("general.author") or reader.text("general.organization"),
        repositories=tuple(repositories)[:1],
        parents=tuple(parents),
        **_read_licence(reader),
        languages=reader.texts("general.languages", MOST_LANGUAGES),
        tags=reader.texts("general.tags", MOST_TAGS),
        writes_text=causal and kind_of(metadata, ()) is LANGUAGE_MODEL,
    )


@dataclass(frozen=True, slots=True)
class _MetadataReader:
    metadata: Metadata

    def text(self, key: str) -> str:
        value = self.metadata.get(key)
        return value.strip()[:_LONGEST] if isinstance(value, str) else ""

    def repository(self, key: str) -> str:
        """Return the repository on the Hub in the URL under `key`, or ''."""
        value = self.metadata.get(key)
        match = _ON_HUB.fullmatch(value.strip()) if isinstance(value, str) else None
        return match[1] if match else ""

    def texts(self, key: str, most: int) -> tuple[str, ...]:
        value = self.metadata.get(key)
        items = value if isinstance(value, list) else []
        found = [item.strip()[:_LONGEST] for item in items[: 10 * most] if isinstance(item, str)]
        return tuple(dict.fromkeys(filter(None, found)))[:most]


def _read_licence(reader: _MetadataReader) -> dict[str, str]:
    named = licence_fields(reader.text("general.license"), reader.text("general.license.name"))
    url = reader.metadata.get("general.license.link")
    if named and isinstance(url, str) and _URL.fullmatch(url):
        named["license_link"] = url
    return named


def licence_fields(identifier: str, name: str = "") -> dict[str, str]:
    """Return the Hub's keys for a licence: an unknown one is `other`, with a name."""
    if identifier.lower() in _LICENCES - {_OTHER}:
        return {"license": identifier.lower()}
    if not identifier and not name:
        return {}
    given = name or (identifier if identifier.lower() != _OTHER else "")
    return {"license": _OTHER} | ({"license_name": _slug(given)} if _slug(given) else {})


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def override_origin(overrides: CardOverrides, origin: ModelOrigin) -> ModelOrigin:
    """Return `origin` with the user's facts in place of its own."""
    values: dict[str, Any] = {}
    if overrides.base_models:
        values |= {"repositories": overrides.base_models, "parents": ()}
    if overrides.license or overrides.license_name:
        values |= {"license": "", "license_name": "", "license_link": ""}
        values |= licence_fields(overrides.license, overrides.license_name)
    for key in ("license_link", "languages"):
        if getattr(overrides, key):
            values[key] = getattr(overrides, key)
    values["tags"] = tuple(dict.fromkeys((*overrides.tags, *origin.tags)))
    return replace(origin, **values)
