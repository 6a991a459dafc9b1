"""Print a CycloneDX 1.6 SBOM of what requant needs at run time, from the hashed lock.

python scripts/ci/sbom.py [LOCK]  >requant.cdx.json

cyclonedx-py reads the lock. Added here: who needs whom (uv's `# via` lines), for which systems (the markers), and the
licences that packages of the same version state where they are installed, so run it where the lock is. No clock and
no random numbers: the same lock and licences give the same bytes. What is printed has passed CycloneDX's own schema.
"""

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

ROOT = Path(__file__).parents[2]
VERSION = SchemaVersion.V1_6
# a requirement of the lock with its marker, its hashes, and who needs it
BLOCK = re.compile(r"^([\w.-]+)==(\S+)(?: ; (.*?))? \\\n(?:    --hash=.*\n)+((?:    #.*\n)*)", re.MULTILINE)


def read_lock(path):
    """Per requirement: name, version, marker or "", and the names of those that need it."""
    found = []
    for name, version, marker, via in BLOCK.findall(path.read_text(encoding="utf-8")):
        needing = re.findall(r"^    #(?: via)? +([\w.-]+)", via.replace("# via\n", "#\n"), re.MULTILINE)
        found.append((name, version, marker, needing))
    return found


def bare(lock):
    """What cyclonedx-py makes of the lock."""
    words = ["requirements", lock, "--pyproject", ROOT / "pyproject.toml", "--output-reproducible"]
    words += ["--spec-version", VERSION.to_version(), "--output-format", "JSON"]
    command = [sys.executable, "-W", "ignore", "-m", "cyclonedx_py", *words]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def licences(name, version):
    """What the package that is installed says of itself, if it is of that version."""
    try:
        said = metadata(name)
    except PackageNotFoundError:
        return []
    if said["Version"] != version:
        return []
    if said["License-Expression"]:
        return [{"expression": said["License-Expression"], "acknowledgement": "declared"}]
    classes = [c.split(" :: ")[-1] for c in said.get_all("Classifier", []) if c.startswith("License :: ")]
    return [{"license": {"name": c, "acknowledgement": "declared"}} for c in classes if c != "OSI Approved"]


def sbom(lock):
    """The document, as JSON text."""
    made, wanted = bare(lock), read_lock(lock)
    components = {(c["name"], c["version"]): c for c in made["components"]}
    assert len(wanted) == len(components), (len(wanted), len(components))
    root = made["metadata"]["component"]["bom-ref"]
    needs = {root: set()} | {f"{name}=={version}": set() for name, version, *_ in wanted}
    for name, version, marker, needing in wanted:
        component = components[name, version]
        component["bom-ref"] = ref = f"{name}=={version}"
        del component["description"]  # the line of the lock again
        if marker:
            component["properties"] = [{"name": "requant:marker", "value": marker}]
        if found := licences(name, version):
            component["licenses"] = found
        for other in needs:
            if other.partition("==")[0] in needing or (other == root and "requant" in needing):
                needs[other].add(ref)
    made["dependencies"] = [{"ref": ref, "dependsOn": sorted(found)} for ref, found in sorted(needs.items())]
    text = json.dumps(made, indent=2, sort_keys=True) + "\n"
    wrong = JsonStrictValidator(VERSION).validate_str(text)
    if wrong is not None:
        raise SystemExit(f"the SBOM is not valid: {wrong}")
    return text


if __name__ == "__main__":
    sys.stdout.write(sbom(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "requirements.lock"))
