"""Coverage-guided fuzzing of what torchcaffe reads: `python tests/fuzz/fuzz.py FORMAT FOLDER [SECONDS]`, with atheris installed.

FOLDER/FORMAT/corpus is seeded from tests/golden and grows; an input that raises anything but CaffeError, or takes more than SLOW
seconds of the processor or more memory than MEMORY, goes to FOLDER/FORMAT/findings, once for each place in the code that raised, with its
traceback.
"""
from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import atheris

os.environ["OMP_NUM_THREADS"] = "1"
with atheris.instrument_imports(include=["torchcaffe", "google.protobuf.text_format"]):
    import torch

    import torchcaffe as caffe
    from torchcaffe import formats, glog, settings
    from torchcaffe.data import datum
    from torchcaffe.data.transformer import Transformer
    from torchcaffe.errors import CaffeError
    from torchcaffe.layers import LAYERS
    from torchcaffe.proto import caffe_pb2, prototxt
    from torchcaffe.train.solver import Solver

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "golden")]
import check  # noqa: E402
from mutate import mutate  # noqa: E402

SLOW, MEMORY = 5, 3 * 2**30
SMALL = 10**6                                           # elements in a net that is run, not only built
NET = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 } } }
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param { num_output: 2 } }
layer { name: "loss" type: "EuclideanLoss" bottom: "ip" bottom: "ip" top: "loss" }
"""
WORDS = ["SGD", "Adam", "step", "poly", "inv", "multistep", "fixed", "net.prototxt", "ip", "data", ""]


# -- what is done with a file of each format -----------------------------------------------------------------------
def net(path: str) -> None:
    """Build it without contents; where it is small, with them, and run it forth and back."""
    for phase in (caffe.TRAIN, caffe.TEST):
        with settings.shapes_only():
            shapes = caffe.Net(path, phase)
        elements = sum(blob.count for blob in shapes.blobs.values()) + sum(b.count for blobs in shapes.params.values() for b in blobs)
        if elements < SMALL and not any(layer.type == "HDF5Output" for layer in shapes.layers):
            real = caffe.Net(path, phase)
            real.forward()
            real.backward()


def solver(path: str) -> None:
    """Build it, and train for two iterations where they are short; nothing is written."""
    param = prototxt.read_solver(path)
    param.ClearField("snapshot")
    made = Solver(path, param.type, param)
    outputs = sum(net.blobs[name].count for net in (made.net, *made.test_nets) for name in net.outputs)      # a log line for each element
    if param.iter_size < 9 and sum(param.test_iter) < 9 and outputs < 1000:
        made.step(2)


def weights(path: str) -> None:
    """Read it, and copy it into a net."""
    formats.read_weights(path)
    caffe.Net("net.prototxt", caffe.TEST).copy_from(path)


def state(path: str) -> None:
    """Read it, and restore a solver from it."""
    formats.read_state(path)
    caffe.get_solver("solver.prototxt").restore(path)


def record(path: str) -> None:
    """The image of a Datum, cut and mirrored."""
    message = datum.parse(Path(path).read_bytes(), "record 0")
    image = datum.image(message, "record 0")
    transform = Transformer(caffe_pb2.TransformationParameter(mirror=True, crop_size=2, scale=0.5), True)
    transform.output_shape(image.shape)
    transform(torch.from_numpy(image[None].copy()), torch.full((3, 1), 0.5))


def mean(path: str) -> None:
    """Read it as a mean file, and take it from an image of its size."""
    image = formats.read_mean(path)
    transform = Transformer(caffe_pb2.TransformationParameter(mean_file=path), False)
    transform.output_shape(image.shape)


# format: what is done, name of the file, its message (None for HDF5), where the seeds are
Target = tuple[Callable[[str], None], str, type | None, str]
TARGETS: dict[str, Target] = {
    "net": (net, "net.txt", caffe_pb2.NetParameter, "**/*net.prototxt"),
    "solver": (solver, "solver.txt", caffe_pb2.SolverParameter, "**/solver.prototxt"),
    "caffemodel": (weights, "a.caffemodel", caffe_pb2.NetParameter, "**/*.caffemodel"),
    "caffemodel_h5": (weights, "a.caffemodel.h5", None, "**/*.caffemodel.h5"),
    "solverstate": (state, "a.solverstate", caffe_pb2.SolverState, "**/*.solverstate"),
    "solverstate_h5": (state, "a.solverstate.h5", None, "**/*.solverstate.h5"),
    "datum": (record, "a.datum", caffe_pb2.Datum, ""),
    "mean": (mean, "a.binaryproto", caffe_pb2.BlobProto, "**/*.binaryproto"),
}


def seeds(golden: Path, pattern: str) -> list[bytes]:
    """The smaller files of the golden vectors, and for records the images in them."""
    if not pattern:
        found = [caffe_pb2.Datum(channels=2, height=3, width=2, data=bytes(range(12)), label=1),
                 caffe_pb2.Datum(channels=1, height=2, width=2, float_data=[0, 1, 2, 3])]
        found += [caffe_pb2.Datum(data=path.read_bytes(), encoded=True) for path in sorted(golden.glob("**/*.png"))[:5]]
        return [message.SerializeToString() for message in found]
    return [path.read_bytes() for path in sorted(golden.glob(pattern)) if path.stat().st_size < 20_000]


class Fuzzer:
    """Runs one target on what libFuzzer comes up with, and counts."""

    def __init__(self, name: str, folder: Path):
        self.run, self.file, self.message, pattern = TARGETS[name]
        self.text, self.executions, self.slowest, self.accepted = self.file.endswith(".txt"), 0, 0.0, 0
        self.corpus, self.findings, self.work = (folder / name / part for part in ("corpus", "findings", "work"))
        for part in (self.corpus, self.findings, self.work):
            part.mkdir(parents=True, exist_ok=True)
        if not (folder / "golden").exists():
            check.unpack(folder / "golden")
        for i, data in enumerate(seeds(folder / "golden", pattern)):
            (self.corpus / f"seed{i}").write_bytes(data)
        self.words = sorted(LAYERS) if name == "net" else WORDS
        os.chdir(self.work)
        Path("net.prototxt").write_text(NET)
        for kind in ("HDF5", "BINARYPROTO"):                # seeds that fit the net, beside the golden ones
            Path("solver.prototxt").write_text('net: "net.prototxt" base_lr: 0.1 lr_policy: "fixed" momentum: 0.9 snapshot_prefix: "s" '
                                               f"snapshot_format: {kind}")
            made = caffe.get_solver("solver.prototxt")
            made.step(1)
            made.snapshot()
        for path in Path().glob(f"s_iter_1{self.file[1:]}"):
            (self.corpus / path.name).write_bytes(path.read_bytes())

    def once(self, data: bytes) -> None:
        """One input: CaffeError is an answer, anything else a finding."""
        self.executions += 1
        Path(self.file).write_bytes(data)
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, 4 * SLOW)
        try:
            with glog.silent():
                self.run(self.file)
            self.accepted += 1
        except CaffeError as error:
            if "\n" in str(error):
                self.keep("several lines", data)
        except Exception as error:  # noqa: BLE001    everything else is what is sought
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "torchcaffe" in frame.filename]
            place = f"{Path(frames[-1].filename).name}_{frames[-1].lineno}" if frames else "outside"
            self.keep(f"{type(error).__name__}_{place}", data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        taken = time.process_time() - start
        self.slowest = max(self.slowest, taken)
        if taken > SLOW:
            self.keep(f"slow_{int(taken)}s", data)

    def keep(self, what: str, data: bytes) -> None:
        """Keep the first input that shows a finding."""
        path = self.findings / what
        if not path.exists():
            path.write_bytes(data)
            path.with_suffix(".trace").write_text(traceback.format_exc())
            print(f"finding: {what}", file=sys.stderr)

    def mutate(self, data: bytes, size: int, seed: int) -> bytes:
        """Half of the time libFuzzer's change of bytes, otherwise a change of the message that the bytes are."""
        draw = random.Random(seed)
        if self.message is None or draw.random() < 0.3:
            return atheris.Mutate(data, size)
        try:
            message = prototxt.parse(data.decode(), self.message()) if self.text else self.message.FromString(data)
        except Exception:  # noqa: BLE001    no message: bytes then
            return atheris.Mutate(data, size)
        mutate(message, draw, self.words)
        return (prototxt.write(message).encode() if self.text else message.SerializePartialToString())[:size]


def main(name: str, folder: str, seconds: str = "90") -> None:
    """Fuzz one format for some seconds, and print what came of it."""
    fuzzer = Fuzzer(name, Path(folder).resolve())
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, lambda *_: (_ for _ in ()).throw(TimeoutError("slow")))
    end = time.monotonic() + float(seconds)

    def once(data: bytes) -> None:
        fuzzer.once(data)
        if time.monotonic() > end:
            found = sorted(path.name for path in fuzzer.findings.iterdir() if path.suffix != ".trace")
            inputs = len(list(fuzzer.corpus.iterdir()))
            print(f"{name}: {fuzzer.executions} executions, {fuzzer.accepted} accepted, {inputs} inputs in the corpus, "
                  f"slowest {fuzzer.slowest:.1f} s, {time.process_time():.0f} s of the processor, findings: {found}", flush=True)
            os._exit(0)                                 # libFuzzer has no way to be asked to stop

    with settings.without_python_layers():
        atheris.Setup([sys.argv[0], str(fuzzer.corpus), "-max_len=20000", "-rss_limit_mb=0", "-timeout=600"], once,
                      custom_mutator=fuzzer.mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
