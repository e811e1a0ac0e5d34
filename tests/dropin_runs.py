"""What transformers, peft and accelerate do with bnbx as `bitsandbytes`, on a model of two layers.

`python dropin_runs.py NAME ...` runs functions of these names, in a folder to write into. First
comes `save`: it makes the model that the others load.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

import bnbx

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
EXACT: dict[str, Any] = {"rtol": 0, "atol": 0}


def save() -> None:
    """A model as a hub has it, of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained("model")


def load(folder: str = "model", **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def bits() -> None:
    """from_pretrained in 4 and 8 bits, saved and loaded again."""
    from transformers import BitsAndBytesConfig

    dense = logits(load())
    cases: list[tuple[dict[str, Any], type, float]] = [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, bnbx.nn.Linear4bit, 0.2),
        ({"load_in_8bit": True}, bnbx.nn.Linear8bitLt, 0.02),
    ]
    for options, kind, error in cases:
        model = load(quantization_config=BitsAndBytesConfig(**options))
        assert type(model.model.layers[0].mlp.up_proj) is kind
        before = logits(model)
        assert 0 < off(before, dense) < error
        model.save_pretrained("saved")
        torch.testing.assert_close(logits(load("saved")), before, **EXACT)


def adapters() -> None:
    """QLoRA: adapters trained on a model in 4 bits, then merged into its codes."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from peft.tuners.lora.bnb import Linear4bit
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    model = prepare_model_for_kbit_training(load(quantization_config=config))
    base = logits(model)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    assert type(layer) is Linear4bit
    codes = layer.base_layer.weight.data.clone()

    from bitsandbytes.optim import PagedAdamW8bit

    assert issubclass(PagedAdamW8bit, bnbx.optim.PagedAdamW8bit)
    optimizer = PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(layer.base_layer.weight.data, codes)

    trained = logits(model)
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.v_proj) is bnbx.nn.Linear4bit
    assert off(logits(merged), trained) < 0.5 * off(base, trained)


def trainer() -> None:
    """A run by a name of transformers, and the same run from its checkpoint."""
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": ids, "labels": ids} for ids in IDS + torch.arange(16)[:, None]]

    def trained(checkpoint: str | None) -> Any:
        arguments = TrainingArguments(
            "out",
            optim="adamw_bnb_8bit",
            learning_rate=1e-2,
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        made = Trainer(model=load(), args=arguments, train_dataset=data)
        made.train(resume_from_checkpoint=checkpoint)
        return made

    whole, resumed = trained(None), trained("out/checkpoint-2")
    state = whole.optimizer.state
    model = whole.model.model
    assert isinstance(whole.optimizer.optimizer, bnbx.optim.AdamW)
    assert state[model.embed_tokens.weight]["m"].dtype == torch.float32
    assert state[model.layers[0].mlp.up_proj.weight]["m"].dtype == torch.uint8
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), **EXACT)
    assert off(logits(whole.model), logits(load())) > 0


def accelerator() -> None:
    """The drop-in is found; a run is saved and loaded; codes are moved off and on."""
    import accelerate
    from accelerate.utils import is_4bit_bnb_available, is_8bit_bnb_available

    assert is_4bit_bnb_available()
    assert is_8bit_bnb_available()

    def step(model: Any, optimizer: Any) -> Tensor:
        run.backward(model(input_ids=IDS, labels=IDS).loss)
        optimizer.step()
        optimizer.zero_grad()
        return logits(model)

    run = accelerate.Accelerator(cpu=True)
    model = load()
    pair = run.prepare(model, bnbx.optim.AdamW8bit(model.parameters(), lr=1e-2))
    step(*pair)
    run.save_state("state")
    expected = step(*pair)
    run.load_state("state")
    torch.testing.assert_close(step(*pair), expected, **EXACT)

    model = load()
    bnbx.quantize_(model, "nf4", double=True)
    before = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    torch.testing.assert_close(logits(model), before, **EXACT)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()
