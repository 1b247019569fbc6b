"""Generate the protobuf modules beside the .proto files.

python -m protos.generate            write them
python -m protos.generate --check    fail when the committed ones differ
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

PROTOS = Path(__file__).parent
OUTPUTS = ("--python_out", "--grpc_python_out", "--mypy_out", "--mypy_grpc_out")
PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")  # installed beside the interpreter, which need not be on the PATH


def generate(out: Path) -> None:
    from grpc_tools import protoc  # a development tool: importing this module must not need it

    sources = [f"protos/{path.name}" for path in sorted(PROTOS.glob("*.proto"))]
    options = [f"{output}={'quiet:' if 'mypy' in output else ''}{out}" for output in OUTPUTS]
    plugins = [f"--plugin={name}={Path(sys.executable).parent / name}" for name in PLUGINS]
    if protoc.main(["protoc", f"-I{PROTOS.parent}", *plugins, *options, *sources]) != 0:
        raise SystemExit("protoc failed")


def main() -> None:
    if "--check" not in sys.argv:
        generate(PROTOS.parent)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {path.name: path.read_text() for path in (Path(folder) / "protos").iterdir()}
    committed = {path.name: path.read_text() for path in PROTOS.glob("*_pb2*")}
    if stale := sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name)):
        raise SystemExit(f"generated modules are stale: {', '.join(stale)}; run `make protos` and commit them")


if __name__ == "__main__":
    main()
