"""What the trainer's source may not do, beyond what ruff sees (pyproject.toml: banned-api)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[3] / "trainer_image" / "lora_trainer"
MODULES = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCES.glob("*.py"))}

PICKLES = {
    "pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "read_pickle", "allow_pickle",
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list", "torch.load", "torch.save", "torch.serialization",
}  # fmt: skip
"""Names that write or read pickles."""

LOADS_CODE = {
    "__import__", "import_module", "spec_from_file_location", "run_path", "run_module", "load_inline", "get_kernel",
    "get_class_from_dynamic_module", "torch.hub",
}  # fmt: skip
"""Names that run code which is found at run time; eval and exec are for ruff (S102, S307)."""

NO_CODE = {
    "GenerationConfig": "reads generation_config.json",
    "PeftModel": "knows no code of others, and the safetensors file is all that was downloaded",
}
"""Whose ``from_pretrained`` has no trust_remote_code, and why it needs none."""


def used_names(tree: ast.AST) -> Iterator[str]:
    """Every name that ``tree`` uses: alone, as an attribute, imported, as a keyword, or as a text for getattr."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.Attribute(value=ast.Name(id=owner), attr=name):
                yield from (name, f"{owner}.{name}")
            case ast.Attribute(attr=name):
                yield name
            case ast.Import(names=aliases):
                yield from (part for alias in aliases for part in alias.name.split("."))
            case ast.ImportFrom(module=module, names=aliases):
                yield from (module or "").split(".")
                yield from (name for alias in aliases for name in (alias.name, f"{module}.{alias.name}"))
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]):
                yield name


FORBIDDEN_EXAMPLES = [
    "import pickle",
    "import torch.distributed as d\nd.all_gather_object([], 1)",
    "import torch.distributed.distributed_c10d as c\nc.broadcast_object_list([])",
    "getattr(dist, 'gather_object')",
    "from torch import load, save",
    "torch.load('x')",
    "numpy.load('x', allow_pickle=True)",
    "importlib.import_module(name)",
]


@pytest.mark.parametrize("source", FORBIDDEN_EXAMPLES)
def test_the_rules_see_what_they_forbid(source: str) -> None:
    assert set(used_names(ast.parse(source))) & (PICKLES | LOADS_CODE)


@pytest.mark.parametrize("module", MODULES)
def test_no_pickle_is_written_or_read(module: str) -> None:
    assert set(used_names(MODULES[module])) & PICKLES == set()


@pytest.mark.parametrize("module", MODULES)
def test_no_code_is_run_that_is_found_at_run_time(module: str) -> None:
    assert set(used_names(MODULES[module])) & LOADS_CODE == set()


def library_loads() -> dict[str, dict[str, object]]:
    """The constant keywords of each call by which transformers reads a directory of others."""
    found = {}
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=owner, attr="from_pretrained" | "from_config" as method), keywords=keywords
                ) if ast.unparse(owner) not in NO_CODE:
                    constants = {key.arg: key.value.value for key in keywords if isinstance(key.value, ast.Constant)}
                    found[f"{name}:{node.lineno} {ast.unparse(owner)}.{method}"] = constants
    return found


def test_code_of_a_model_is_never_run_and_pickled_weights_are_never_read() -> None:
    loads = library_loads()
    kinds = {call.split()[1] for call in loads}
    assert {"AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained", "AutoModelForCausalLM.from_config"} <= kinds
    assert {call for call, keywords in loads.items() if keywords.get("trust_remote_code") is not False} == set()
    weights = {call: keywords for call, keywords in loads.items() if "Model" in call and "from_pretrained" in call}
    assert weights
    assert {call for call, keywords in weights.items() if keywords.get("use_safetensors") is not True} == set()
