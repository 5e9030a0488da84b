"""Open an exported graph in onnxruntime, once its files are known to be sound."""

import ctypes
import sys
from pathlib import Path

import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo
from packaging.version import Version

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
CPU, CUDA = PROVIDERS["cpu"], PROVIDERS["cuda"]
# Before it, Attention with grouped heads, a past and a mask fails in float32 and errs in float16.
STANDARD_SINCE = Version("1.25")


def find_graph(path: Path, streams: int | None = None) -> Path:
    """The .onnx file that ``path`` is, or that is in the folder ``path``.

    Args:
        streams: the P that the graph shall have; by default it is model.onnx, or the first.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another kind of file, or none has so many streams.
    """
    if streams is None:
        return _graph_files(path)[0]
    graphs = find_graphs(path)
    if streams not in graphs:
        there = ", ".join(map(str, graphs))
        raise ValueError(f"{path}: no graph of P={streams}, only of P={there}")
    return graphs[streams]


def find_graphs(path: Path) -> dict[int, Path]:
    """The graphs that ``path`` is or holds by their numbers of streams, in rising order.

    Raises:
        FileNotFoundError, ValueError: as ``find_graph``; or one is not a graph of ours.
    """
    files = reversed(_graph_files(path))  # of two with the same P, the first counts
    graphs = {int(metadata(load_graph(file), file)["streams"]): file for file in files}
    return dict(sorted(graphs.items()))


def _graph_files(path: Path) -> list[Path]:
    """Graphs by name, so that model.onnx comes before model_p2.onnx."""
    if path.is_file():
        if path.suffix != ".onnx":
            raise ValueError(f"{path}: not an .onnx file")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    found = sorted(path.glob("*.onnx")) or sorted(path.glob("onnx/*.onnx"))
    if not found:
        raise FileNotFoundError(f"{path}: no model.onnx in this folder")
    return sorted(found, key=lambda file: file.stem)


def load_graph(file: Path) -> onnx.ModelProto:
    """A graph without its weights.

    Raises:
        ValueError: the file is none.
    """
    try:
        model = onnx.load(str(file), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ValueError(f"{file}: not an ONNX graph") from error
    if not model.graph.node:
        raise ValueError(f"{file}: not an ONNX graph")
    return model


def metadata(graph: onnx.ModelProto, file: Path) -> dict[str, str]:
    """What ``export_onnx`` noted in a graph, without the names' common beginning.

    Raises:
        ValueError: it did not write this graph.
    """
    prefix = "parscale."
    about = {
        entry.key.removeprefix(prefix): entry.value
        for entry in graph.metadata_props
        if entry.key.startswith(prefix)
    }
    if "kv_layout" not in about:
        raise ValueError(f"{file}: not a graph that parscale export-onnx wrote")
    return about


def read_graph(file: Path) -> onnx.ModelProto:
    """An exported graph without its weights, after a look at the file that holds them.

    Raises:
        FileNotFoundError: the external data is missing.
        ValueError: not an ONNX graph, or external data that is truncated or outside its folder.
    """
    model = load_graph(file)
    ends: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            info = ExternalDataInfo(tensor)
            end = int(info.offset or 0) + int(info.length or 0)
            ends[info.location] = max(end, ends.get(info.location, 0))
    folder = file.parent.resolve()
    for location, end in ends.items():
        data = file.parent / location
        if Path(location).is_absolute() or not data.resolve().is_relative_to(folder):
            raise ValueError(f"{file}: its external data {location!r} is outside its folder")
        if not data.is_file():
            raise FileNotFoundError(f"{data}: missing; {file.name} keeps its weights there")
        if data.stat().st_size < end:
            raise ValueError(f"{data}: truncated: {data.stat().st_size} of {end} bytes")
    return model


def check_operators(file: Path, ops: str) -> None:
    """Refuse standard operators where onnxruntime's own of them are not sound.

    Raises:
        ValueError: the graph has them, and onnxruntime is too old.
    """
    if ops == "standard" and Version(ort.__version__) < STANDARD_SINCE:
        raise ValueError(
            f"{file}: standard operators need onnxruntime {STANDARD_SINCE} or later, this is "
            f"{ort.__version__}; export with --ops fused"
        )


def open_session(
    file: Path,
    name: str,
    *,
    device_id: int = 0,
    threads: int | None = None,
    cuda_graph: bool = False,
    accuracy_level: str = "4",
) -> ort.InferenceSession:
    """A session on an execution provider, given by its full name.

    Raises:
        ValueError: the provider does not start, or cannot run the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it would log comes as an exception
    # For quantised matrices in standard operators, which onnxruntime turns into MatMulNBits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", accuracy_level)
    if threads is not None:
        options.intra_op_num_threads = threads
    providers: list = [CPU]
    if name == CUDA:
        settings = {
            "device_id": str(device_id),
            "enable_cuda_graph": str(int(cuda_graph)),
            "use_tf32": "0",  # float32 is to be float32
        }
        providers = [(CUDA, settings), *providers]
    elif name != providers[0]:
        providers = [name, *providers]
    try:
        session = ort.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common class of their own
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file}: {name} cannot run this graph: {reason}") from error
    if session.get_providers()[0] != name:
        raise ValueError(f"{name} was asked for but did not start here; use --provider cpu")
    return session


def choose_provider(provider: str | None) -> str:
    """The full name of the asked-for provider; by default CUDA where it works, else the CPU.

    Raises:
        ValueError: this onnxruntime lacks it, or there is no device for it.
    """
    available = ort.get_available_providers()
    if provider is None:
        return CUDA if CUDA in available and cuda_works() else CPU
    name = PROVIDERS.get(provider.lower(), provider)
    if name not in available:
        known = ", ".join(available)
        raise ValueError(f"provider {provider!r} is not in this onnxruntime, which has {known}")
    if name == CUDA and not cuda_works():
        raise ValueError("provider 'cuda' was asked for, but there is no CUDA device here")
    return name


def cuda_works() -> bool:
    """Whether the driver is there and knows a device; onnxruntime-gpu installs without either."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return False
    if count.value and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # the CUDA libraries that pip installed, if it did
    return count.value > 0
