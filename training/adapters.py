"""LoRA, DoRA and rsLoRA through peft: small matrices are trained beside frozen weights, saved as peft does, and merged.

The frozen matrices are what they are multiplied as: bfloat16 in a bf16 run, or 4-bit NF4 through bitsandbytes (QLoRA,
Dettmers et al. 2023: blocks of 64, their scales quantised again).
"""

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import mpt.checkpoint
import mpt.manifest
from mpt.catalog import ADAPTER_CONFIG, has_model, resolve
from mpt.chat_template import ChatTemplate
from mpt.checkpoint_text import open_tokenizer
from mpt.dropout import Dropout
from mpt.errors import UserError
from mpt.extras import install
from mpt.files import read_json, whole_folder
from mpt.lora import trained_context
from mpt.model import Linear
from mpt.prompts import PromptFormat, open_format
from mpt.style_template import StyleTemplate, jinja
from mpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mpt.transformers_model import MPTForCausalLM
    from training.run import Lora, Precision

log = logging.getLogger(__name__)

_PROBE = 64  # tokens, the vocabulary's first: what a merged model's logits are compared on


def add(model: "MPTForCausalLM", lora: "Lora", precision: "Precision") -> None:
    """Freeze a model on the meta device and put adapters beside the named projections of every block, in place.

    Raises UserError when 4 bits are asked for and bitsandbytes is not installed.
    """
    from peft import LoraConfig, inject_adapter_in_model

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        use_dora=lora.dora,
        use_rslora=lora.rslora,
    )
    inject_adapter_in_model(config, model)
    if lora.bits == 4:  # after peft has come, which cannot read lengths of rows from such a matrix without memory
        for name, module in list(model.transformer.blocks.named_modules()):
            if isinstance(module, Linear):
                parent, _, key = name.rpartition(".")
                setattr(model.transformer.blocks.get_submodule(parent), key, _four_bit(module, precision))
    for name, module in model.named_modules():  # peft's own draws depend on what was drawn before
        if name.endswith(".lora_dropout") and lora.dropout:
            module["default"] = Dropout(lora.dropout, name)
    model.peft_config = {"default": config}  # what a later save writes


def is_adapter(name: str) -> bool:
    """Whether a module is an adapter's, by its name in the model."""
    return ".lora_" in name


@contextlib.contextmanager
def off(model: "MPTForCausalLM") -> Iterator[None]:
    """The base alone, without dropout, as long as the context lasts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    was_training = model.training
    model.eval()
    try:
        for layer in layers:
            layer._disable_adapters = True  # its `enable_adapters` would freeze the adapters too, and thaw all of them
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        model.train(was_training)


def name_in_base(name: str) -> str:
    """A parameter's name before adapters were put beside it."""
    return name.replace(".base_layer.", ".")


def draw(name: str, module: nn.Module, model: nn.Module) -> None:
    """New values of an adapter's matrix, as peft draws them: A uniform, B zero, so that it begins as the base.

    DoRA's magnitudes begin as the lengths of the base's rows, as they are multiplied.
    """
    if ".lora_magnitude_vector." in name:
        from peft.utils.integrations import dequantize_module_weight

        base = model.get_submodule(name.rpartition(".lora_magnitude_vector.")[0]).base_layer
        module.weight = nn.Parameter(dequantize_module_weight(base).float().norm(dim=1))
        return
    weight: Tensor = module.weight  # type: ignore[assignment]
    if ".lora_A." in name:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    else:
        nn.init.zeros_(weight)


def compress(name: str, module: nn.Module, lora: "Lora", precision: "Precision") -> None:
    """Keep a block's frozen matrix as it is multiplied; everything else stays float32."""
    if not isinstance(module, nn.Linear) or not name.startswith("transformer.blocks."):
        return
    if lora.bits == 4:
        import bitsandbytes

        weight: Any = bitsandbytes.nn.Params4bit(
            module.weight.detach(),
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            module=module,  # type: ignore[arg-type]
        )
        module.weight = weight.to(module.weight.device)  # quantised by the move
    elif precision == "bf16":
        module.to(torch.bfloat16)


def _four_bit(linear: nn.Linear, precision: "Precision") -> nn.Module:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"4-bit weights need bitsandbytes; {install('qlora')}") from error
    if linear.in_features % 64:  # bitsandbytes 0.50 on CPU reads such a matrix back wrong: blocks run over its rows
        raise UserError(f"4-bit weights need matrices of a multiple of 64 columns, here are {linear.in_features}")
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    # Else a held-out loss on CPU repacks the weights for inference and rounds their scales for good.
    made.support_avx512bf16_for_cpu = False
    return made.requires_grad_(False)


def save(
    model: "MPTForCausalLM",
    values: dict[str, Tensor],
    base: str,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | StyleTemplate | None,
    folder: Path,
    manifest: dict[str, Any],
) -> Path:
    """Write adapter_config.json, adapter_model.safetensors, the tokenizer and a manifest; the folder appears whole.

    chat_template: written beside the tokenizer.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = get_peft_model_state_dict(model, state_dict=values)
    prefix = "base_model.model."  # what peft puts before a wrapped model's names
    tensors = {prefix + name: tensor.contiguous() for name, tensor in weights.items()}
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.inference_mode = True
    with whole_folder(folder) as partial:
        save_file(tensors, partial / "adapter_model.safetensors")
        config.save_pretrained(partial)
        tokenizer.save(partial)
        if chat_template is not None:
            chat_template.save(partial)
        mpt.manifest.write_manifest(partial, {**manifest, "base": base})
    return folder


def chat_template(prompts: PromptFormat) -> ChatTemplate | StyleTemplate | None:
    """What other programs render a checkpoint's messages with; None for a style without messages."""
    if prompts.template is not None:
        return prompts.template
    source = jinja(prompts.style)
    return None if source is None else StyleTemplate(source)


def merge(folder: Path, out: Path, dtype: torch.dtype | None = None) -> Path:
    """The base with a LoRA run's adapter added to its weights, as a Hugging Face folder.

    The sum is made in float32 and rounded once; the log says what that changed. dtype: None keeps the adapter's or the
    base's, whichever is more precise. Raises UserError when folder holds no adapter.
    """
    from peft import PeftModel

    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError(f"`{folder}` has no adapter_config.json; give the `model` folder of a LoRA run")
    if not (folder / "adapter_model.safetensors").is_file():
        what = "a whole model, with its adapters merged" if has_model(folder) else "no adapter_model.safetensors"
        raise UserError(f"`{folder}` holds {what}; give the `model` folder of a LoRA run")
    mpt.manifest.verify_manifest(folder)
    base = read_json(path)["base_model_name_or_path"]
    model = mpt.checkpoint.load(base, dtype=torch.float32)
    dtype = dtype or torch.promote_types(_adapter_dtype(folder), _base_dtype(base))
    with warnings.catch_warnings():  # peft asks transformers for a name that goes with its version 6
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    entries = {k: v for k, v in (mpt.manifest.read_manifest(folder) or {}).items() if k != "files"}
    merged.config.max_seq_len = trained_context(folder, merged.config)
    tokenizer = open_tokenizer(folder, model.config.vocab_size)
    template = chat_template(open_format(folder, entries.get("prompt_style", "none"), tokenizer))
    _round(merged, dtype)
    return mpt.checkpoint.save(merged, out, tokenizer=tokenizer, chat_template=template, manifest=entries)


def _base_dtype(base: str) -> torch.dtype:
    place = resolve(base)
    return mpt.checkpoint.stored_dtype(place, mpt.checkpoint.read_config(place))


def _adapter_dtype(folder: Path) -> torch.dtype:
    """The most precise dtype of an adapter's tensors."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        dtypes = [file.get_tensor(name).dtype for name in file.keys()]  # noqa: SIM118  # no mapping
    return reduce(torch.promote_types, dtypes)


@torch.no_grad()
def _round(model: "MPTForCausalLM", dtype: torch.dtype) -> None:
    """Round a float32 model's weights, and say the largest change of a weight, and of a logit of the probe."""
    if dtype == torch.float32:
        return
    ids = torch.arange(_PROBE).remainder(model.config.vocab_size)[None]
    before = model(ids).logits
    largest = 0.0
    for parameter in model.parameters():
        rounded = parameter.to(dtype).float()
        largest = max(largest, float((rounded - parameter).abs().max()))
        parameter.copy_(rounded)
    change = float((model(ids).logits - before).abs().max())  # of the weights alone: computed in float32 again
    name = str(dtype).removeprefix("torch.")
    log.info("merged in float32; %s changes a weight by at most %.2g, a logit by at most %.2g", name, largest, change)
    model.to(dtype)
