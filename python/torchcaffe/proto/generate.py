"""Makes caffe_pb2.py and its type stub from caffe.proto; needs grpcio-tools (the dev extra).

protoc only compiles the description; the module around it is written here, for two reasons.  protoc's own module refuses to
load under another major version of protobuf, this one loads under 5, 6 and 7 alike.  And it keeps the messages in a
descriptor pool of their own, so that another `caffe` in the same process can register its package `caffe` in the default one.
"""
from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

MODULE = '''"""Caffe's messages.  Generated from caffe.proto by `python -m torchcaffe.proto.generate`: do not edit."""
from google.protobuf import descriptor_pool
from google.protobuf.internal import builder

DESCRIPTOR = descriptor_pool.DescriptorPool().AddSerializedFile(
{serialized})
builder.BuildMessageAndEnumDescriptors(DESCRIPTOR, globals())
builder.BuildTopDescriptorsAndMessages(DESCRIPTOR, __name__, globals())
'''


def main() -> int:
    from grpc_tools import protoc  # type: ignore[import-untyped, unused-ignore]

    folder = Path(__file__).parent
    with TemporaryDirectory() as temporary:
        compiled = Path(temporary) / "caffe.bin"
        status = protoc.main(["protoc", f"-I{folder}", f"--descriptor_set_out={compiled}", f"--pyi_out={folder}",
                              str(folder / "caffe.proto")])
        if status:
            return int(status)
        from google.protobuf import descriptor_pb2
        (file,) = descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes()).file
    data = file.SerializeToString(deterministic=True)
    lines = "\n".join(f"    {data[i:i + 40]!r}" for i in range(0, len(data), 40))
    (folder / "caffe_pb2.py").write_text(MODULE.replace("{serialized}", lines), encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main())
