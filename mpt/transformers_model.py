"""MPT behind transformers' interface: `generate`, `from_pretrained`, `save_pretrained`, peft, Auto classes, pipelines.

Apart from the model itself (`mpt/model.py`), because its import takes more time than torch's, and 200 MB: a
server does without.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from mpt.config import MPTConfig
from mpt.errors import UnsupportedConfig
from mpt.model import Linear, MPTLanguageModel, MPTModel


class MPTForCausalLM(PreTrainedModel, GenerationMixin, MPTLanguageModel):
    """MPT with its head, of drawn weights: `forward`, transformers' `generate`, peft and pipelines work on it."""

    config: MPTConfig
    config_class = MPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MPTBlock"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    if TYPE_CHECKING:
        # What transformers brings, which tells no types.
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __init__(self, config: MPTConfig) -> None:
        super().__init__(config)
        self.transformer = MPTModel(config)
        self.initialize_weights()  # before the head is made: a seed gives the weights that it always gave
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """llm-foundry's `kaiming_normal_` (fan_in, relu): std sqrt(2 / fan_in), norms 1, biases 0.

        Projections back into the residual stream are divided by sqrt(2 L); an embedding counts d_model as its fan_in.
        """
        init = self.config.init_config or {}
        if isinstance(module, nn.Linear | nn.Embedding):
            if init["name"] != "kaiming_normal_" or init["fan_mode"] != "fan_in":
                scheme = f"`{init['name']}`, `{init['fan_mode']}`"
                raise UnsupportedConfig(
                    f"init_config {scheme}: new weights are drawn by `kaiming_normal_`, `fan_in` only"
                )
            std = (2 / module.weight.shape[1]) ** 0.5
            if init["init_div_is_residual"] and getattr(module, "feeds_residual", False):
                std /= (2 * self.config.n_layers) ** 0.5
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, embeddings: nn.Linear) -> None:
        self.lm_head = embeddings

    def create_masks_for_generate(self, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """The (B, S) mask as it is: transformers' `generate` asks this hook, and would make (B, 1, T, S) of it."""
        return attention_mask

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sequence_id: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), or of the last `logits_to_keep` positions; the mean loss when labels (B, T) are given.

        Labels are the input ids, shifted inside; -100 is not learned.
        """
        out = MPTLanguageModel.forward(
            self,
            input_ids,
            attention_mask=attention_mask,
            sequence_id=sequence_id,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            position_ids=position_ids,
        )
        if labels is not None:
            out.loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return out


def register() -> None:
    """Make transformers' AutoConfig and AutoModelForCausalLM, and so `pipeline`, load MPT with this class."""
    AutoConfig.register("mpt", MPTConfig, exist_ok=True)
    AutoModelForCausalLM.register(MPTConfig, MPTForCausalLM, exist_ok=True)
