"""Kinds of files: what a GGUF file holds beside a language model, and how an engine is started with it.

Sources: llama.cpp b11434, common/arg.cpp (options), common/speculative.cpp (types of drafts), src/llama-arch.cpp and
src/models (architectures); the architectures of diffusion models are those of ComfyUI-GGUF and stable-diffusion.cpp.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from requant.errors import BadInput
from requant.model.kept import projector_types

if TYPE_CHECKING:
    from requant.container.metadata import Metadata

_FILE_ALONE = "give it --size or --bpw, which limit the file and not the memory"
OUTPUT = "{}"  # the place of the file in a start command


@dataclass(frozen=True, slots=True)
class FileKind:
    """One kind of file: its `name` for plans, in `words`, and the words of the `start` command.

    `alone`: an engine starts it as a model, so it has a context and a budget in VRAM of its own. `beside`: how to count
    it in the budget of its model.
    """

    name: str
    words: str
    start: tuple[str, ...] = ("llama-server", "-m", OUTPUT)
    alone: bool = True
    beside: str = _FILE_ALONE

    @property
    def is_draft(self) -> bool:
        """Return whether it is a head that drafts for a model; its name is the engine's type of draft."""
        return self.name.startswith("draft-")

    @property
    def has_hyperparameters(self) -> bool:
        """Return whether it has the keys of a language model."""
        return self.name not in _NO_HYPERPARAMETERS


_MODEL = ("llama-server", "-m", "MODEL.gguf")
LANGUAGE_MODEL = FileKind("model", "a language model")
PROJECTOR = FileKind(
    "projector",
    "a projector",
    (*_MODEL, "--mmproj", OUTPUT),
    alone=False,
    beside="plan its model with --mmproj, and convert it with --type Q8_0",
)
_KINDS = (
    LANGUAGE_MODEL,
    PROJECTOR,
    FileKind("embedding", "an embedding model", ("llama-server", "-m", OUTPUT, "--embedding")),
    FileKind("reranker", "a reranking model", ("llama-server", "-m", OUTPUT, "--reranking")),
    FileKind("codec", "a decoder of speech", ("llama-tts", "-m", "MODEL.gguf", "-mv", OUTPUT), alone=False),
    FileKind("diffusion", "a diffusion model", ("sd-cli", "--diffusion-model", OUTPUT), alone=False),
    FileKind("diffusion-text", "a language model that diffuses", ("llama-diffusion-cli", "-m", OUTPUT)),
    *(
        FileKind(
            kind,
            words,
            (*_MODEL, "-md", OUTPUT, "--spec-type", kind),
            alone=False,
            beside=f"plan its model with --draft; {_FILE_ALONE}",
        )
        for kind, words in (
            ("draft-mtp", "a head of multi-token prediction"),
            ("draft-eagle3", "a draft head of EAGLE-3"),
            ("draft-dflash", "a draft head of DFlash"),
            ("draft-dspark", "a draft head of DSpark"),
        )
    ),
)
_BY_NAME = {kind.name: kind for kind in _KINDS}
_DIFFUSION = frozenset(
    "aura chroma cosmos flux hidream hyvid lumina2 ltxv pig qwen_image sd1 sd3 sdxl wan z_image".split()  # noqa: SIM905
)
_DIFFUSION_TEXT = frozenset(["dream", "llada", "llada-moe", "rnd1"])
_EMBEDDING = frozenset(
    """
    bert eurobert gemma-embedding jina-bert-v2 jina-bert-v3 llama-embed modern-bert neo-bert nomic-bert nomic-bert-moe
    t5encoder
    """.split()  # noqa: SIM905
)
_BY_ARCH = {
    "clip": "projector",
    "wavtokenizer-dec": "codec",
    "eagle3": "draft-eagle3",
    "dflash": "draft-dflash",
    "gemma4-assistant": "draft-mtp",
    **dict.fromkeys(_DIFFUSION, "diffusion"),
    **dict.fromkeys(_DIFFUSION_TEXT, "diffusion-text"),
    **dict.fromkeys(_EMBEDDING, "embedding"),
}
_POOLING_RANK = 4  # LLAMA_POOLING_TYPE_RANK
_NO_HYPERPARAMETERS = ("projector", "diffusion", "codec")


def kind_named(name: object) -> FileKind:
    """Return the kind of this name in a plan; a plan without one is for a language model."""
    return _BY_NAME.get(name, LANGUAGE_MODEL) if isinstance(name, str) else LANGUAGE_MODEL


def kind_of(metadata: Metadata, names: Collection[str]) -> FileKind:
    """Return the kind of a file with this metadata and tensors of these names."""
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str):
        return LANGUAGE_MODEL
    name = _BY_ARCH.get(arch)
    pooling = metadata.get(f"{arch}.pooling_type")
    if name in (None, "embedding") and isinstance(pooling, int) and pooling > 0:
        name = "reranker" if pooling == _POOLING_RANK else "embedding"
    if name == "draft-dflash" and "markov_w1.weight" in names:
        name = "draft-dspark"
    if name is None and is_prediction_head(metadata, names):
        name = "draft-mtp"
    return kind_named(name)


def is_prediction_head(metadata: Metadata, names: Collection[str]) -> bool:
    """Return whether the file has layers of multi-token prediction and none of the trunk before them.

    llama.cpp tells it by the missing norm of layer 0.
    """
    arch = metadata.get("general.architecture")
    n_nextn = metadata.get(f"{arch}.nextn_predict_layers")
    return isinstance(n_nextn, int) and n_nextn > 0 and bool(names) and not any(n.startswith("blk.0.") for n in names)


def describe_kind(metadata: Metadata, kind: FileKind) -> str:
    """Return the kind in words, with the types of a projector."""
    types = sorted(projector_types(metadata))
    return f"{kind.words} of type {' and '.join(types)}" if kind is PROJECTOR and types else kind.words


def check_predicts_tokens(metadata: Metadata, names: Collection[str]) -> None:
    """Raise BadInput for a file that no text is run on by itself, whatever its architecture: it predicts no token."""
    check_is_language_model(metadata)
    kind, arch = kind_of(metadata, names), metadata.get("general.architecture")
    why = "runs only together with its model" if kind.is_draft else None
    if arch in _EMBEDDING:
        why = "is an encoder and predicts no next token"
    if kind.name == "diffusion-text":
        why = "predicts no next token"
    if why is not None:
        raise BadInput(metadata.path, f"is {kind.words}, which {why}")


def check_is_language_model(metadata: Metadata) -> None:
    """Raise BadInput for a file whose architecture has no hyperparameters of a language model."""
    arch = metadata.get("general.architecture")
    name = _BY_ARCH.get(arch) if isinstance(arch, str) else None
    kind = kind_named(name)
    if not kind.has_hyperparameters:
        raise BadInput(metadata.path, f"is {kind.words}, no language model", hint=kind.beside)
