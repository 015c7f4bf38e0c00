"""The installed package: its metadata, types, stubs and documentation."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import moba

PACKAGE = Path(moba.__file__).parent
STUBS = ast.parse((PACKAGE / "ops.pyi").read_text())


def test_wheel_is_for_any_python_and_requires_torch_alone():
    about = importlib.metadata.distribution("moba")
    assert "py3-none-" in about.read_text("WHEEL")
    assert [need for need in about.requires if "extra" not in need] == ["torch>=2.10"]
    assert (PACKAGE / "py.typed").exists()


def test_licences_of_what_is_linked_in_are_included():
    files = importlib.metadata.files("moba")
    assert {"LICENSE", "highway.txt"} <= {file.name for file in files if "licenses" in file.parts}


def symbols(*flags):
    command = ["nm", "--dynamic", *flags, PACKAGE / "libmoba_torch.so"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in done.stdout.splitlines()]


def test_module_uses_the_stable_abi_of_torch_and_nothing_of_python():
    needed = symbols("--undefined-only")
    assert [name for name in needed if name.startswith(("Py", "_Py"))] == []
    cpp_of_torch = ("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "_ZNK5torch")
    assert [name for name in needed if name.startswith(cpp_of_torch)] == []
    assert any(name.startswith("aoti_torch_") for name in needed)


def test_module_exports_no_function_of_the_library():
    exported = symbols("--defined-only", "--no-weak")
    assert [name for name in exported if name.startswith(("_ZN4moba", "_ZN3hwy"))] == []
    assert "moba_last_argument_error" in exported


def test_stubs_match_the_schemas():
    schemas = {
        name: getattr(moba.ops, name)._schema
        for name in vars(moba.ops)
        if hasattr(getattr(moba.ops, name), "_schema")
    }
    stubs = {node.name: node for node in STUBS.body if isinstance(node, ast.FunctionDef)}
    assert stubs.keys() == schemas.keys()
    names = {
        "Tensor": "Tensor",
        "int": "int",
        "SymInt": "int",
        "bool": "bool",
        "str": "str",
        "Optional[float]": "float | None",
        "Optional[Tensor]": "Tensor | None",
    }
    for name, schema in schemas.items():
        arguments = stubs[name].args
        assert [a.arg for a in arguments.args] == [a.name for a in schema.arguments]
        assert [ast.unparse(a.annotation) for a in arguments.args] == [
            names[str(a.type)] for a in schema.arguments
        ]
        defaults = [a.default_value for a in schema.arguments if a.has_default_value()]
        assert [ast.literal_eval(d) for d in arguments.defaults] == defaults
        assert ast.get_docstring(stubs[name])


def test_public_names_are_documented():
    for name in moba.__all__:
        assert getattr(moba, name).__doc__, name
    assert "bit-identical" in ast.get_docstring(STUBS)


def test_package_imports_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None; import moba, torch; print(moba.ops.select)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
