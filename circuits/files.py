"""Safe files: written whole or not at all, read without running code (safetensors and JSON only)."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def write_atomically(path: str | Path, content: bytes | str) -> Path:
    """Write to a temporary file beside `path`, then rename: readers see the old file or the new one, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; give what open() would have given
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | Path, content: Any) -> Path:
    return write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def read_json(path: str | Path) -> Any:
    """Raises FileNotFoundError or ValueError, each naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; expected a JSON file that luthier saved")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); expected a file that luthier saved") from None


def stem_of(path: str | Path) -> Path:
    """`runs/x`, `runs/x.json` and `runs/x.safetensors` all name the pair `runs/x.*`."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".safetensors", ".json") else path


def save_tensors(stem: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write `stem.safetensors` and `stem.json`. The JSON is renamed last: a pair with a JSON file is complete."""
    from safetensors.torch import save

    stem = stem_of(stem)
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    write_atomically(stem.parent / f"{stem.name}.safetensors", content)
    write_json(stem.parent / f"{stem.name}.json", {**meta, "sha256": hashlib.sha256(content).hexdigest()})
    return stem


def load_tensors(stem: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a pair written by `save_tensors`; a pair whose halves do not belong together is refused."""
    from safetensors.torch import load

    stem = stem_of(stem)
    meta = read_json(stem.parent / f"{stem.name}.json")
    file = stem.parent / f"{stem.name}.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(file)!r}; it belongs beside {stem.name}.json")
    content = file.read_bytes()
    if meta.pop("sha256", None) != hashlib.sha256(content).hexdigest():
        raise ValueError(f"{file.name} is not the file {stem.name}.json was saved with; save both again")
    return load(content), meta


def fingerprint(content: Any) -> str:
    """Twelve hex digits that change when the content does: for provenance, not for security."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
