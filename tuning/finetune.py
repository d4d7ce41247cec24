"""Fine-tunes one LoRA adapter for one task on the CPU and saves it in PEFT's format. Knows no server.

    python -m tuning.finetune --task viggo --data DATA --base BASE --out tuning/adapters/viggo --steps 300

The recipe is the paper's: rank 8 on q_proj and v_proj, alpha 16, learning rate 2e-3, warm-up, cosine decay.
Two things make it affordable on a CPU, and neither changes the loss: the instruction that all rows of a batch
start with runs once, its keys and values shared, and the vocabulary is projected for target tokens only.
"""

import argparse
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tuning.card import TrainingFacts, save_facts, write_card
from tuning.metrics import mean_score
from tuning.tasks import TASKS, Row, Task, load_rows

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_IGNORED = -100
_WARMUP_FRACTION = 0.03
_MAX_GRADIENT_NORM = 1.0


@dataclass(slots=True, frozen=True)
class Example:
    """One training row as token ids; the target ends with the end-of-turn token."""

    prompt_ids: list[int]
    target_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)


@dataclass(slots=True, frozen=True)
class Recipe:
    """What decides the result besides the data and the base model."""

    steps: int
    batch: int = 16
    learning_rate: float = 2e-3
    seed: int = 0
    rank: int = 8
    alpha: int = 16
    max_tokens: int = 110


def encode(tokenizer: PreTrainedTokenizerBase, task: Task, row: Row) -> Example:
    """Chat prompt and target as token ids. Raises KeyError if a field of the template is missing."""
    prompt = tokenizer.apply_chat_template(
        task.messages(row.fields), tokenize=False, add_generation_prompt=True
    )
    prompt_ids = tokenizer(str(prompt), add_special_tokens=False).input_ids
    target_ids = tokenizer(row.target, add_special_tokens=False).input_ids
    return Example(prompt_ids, [*target_ids, end_of_turn(tokenizer)])


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer. Raises ValueError when the tokenizer has no single one."""
    token = tokenizer.eos_token_id
    if not isinstance(token, int):
        raise ValueError(f"the tokenizer's end-of-turn token is {token!r}, not one token")
    return token


def shared_prefix(examples: Sequence[Example]) -> int:
    """How many leading prompt tokens all examples share, leaving each at least one of its own."""
    length = min(len(example.prompt_ids) for example in examples) - 1
    first = examples[0].prompt_ids
    for example in examples[1:]:
        while example.prompt_ids[:length] != first[:length]:
            length -= 1
    return length


def batches(examples: Sequence[Example], size: int, shuffler: random.Random) -> Iterator[list[Example]]:
    """Endless batches: shuffled each epoch, neighbours of like length together so that little is padding."""
    while True:
        pool = shuffler.sample(examples, len(examples))
        window = size * 16
        chosen: list[list[Example]] = []
        for start in range(0, len(pool), window):
            by_length = sorted(pool[start : start + window], key=len)
            chosen += [by_length[i : i + size] for i in range(0, len(by_length), size)]
        shuffler.shuffle(chosen)
        yield from chosen


def learning_rate_factor(step: int, steps: int) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then cosine down to zero."""
    warmup = max(5, round(steps * _WARMUP_FRACTION))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def target_loss(model: PeftModel, batch: Sequence[Example], prefix_length: int) -> torch.Tensor:
    """Mean cross-entropy over the batch's target tokens, a float32 scalar.

    The first `prefix_length` prompt tokens must be the same in every example. Padding stands on the right,
    where causal attention never lets a real token see it, so no padding mask is needed.
    """
    causal: PreTrainedModel = model.get_base_model()  # type: ignore[assignment]
    cache = DynamicCache()
    if prefix_length:
        prefix_1P = torch.tensor([batch[0].prompt_ids[:prefix_length]])
        causal.model(input_ids=prefix_1P, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(batch))

    width = max(len(example) for example in batch) - prefix_length - 1
    ids_BT = torch.zeros(len(batch), width, dtype=torch.long)
    next_BT = torch.full((len(batch), width), _IGNORED)
    for row, example in enumerate(batch):
        own = torch.tensor(example.prompt_ids[prefix_length:] + example.target_ids)
        ids_BT[row, : len(own) - 1] = own[:-1]
        first_target = len(example.prompt_ids) - prefix_length
        next_BT[row, first_target - 1 : len(own) - 1] = own[first_target:]

    hidden_BTH = causal.model(input_ids=ids_BT, past_key_values=cache, use_cache=True).last_hidden_state
    is_target_BT = next_BT != _IGNORED
    logits_NV = causal.lm_head(hidden_BTH[is_target_BT])
    return torch.nn.functional.cross_entropy(logits_NV.float(), next_BT[is_target_BT])


def train(
    base: PreTrainedModel, examples: Sequence[Example], recipe: Recipe, report: Callable[[str], None]
) -> tuple[PeftModel, list[float]]:
    """Wraps `base` with a new adapter and trains it; `report` hears of progress every ten steps.

    Returns the model and the loss of every step. Raises ValueError without examples.
    """
    if not examples:
        raise ValueError("no training rows: is max_tokens too small?")
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    model.train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, recipe.steps)
    )
    prefix_length = shared_prefix(examples)
    supply = batches(examples, recipe.batch, random.Random(recipe.seed))

    losses: list[float] = []
    started = time.monotonic()
    for step, batch in enumerate(itertools.islice(supply, recipe.steps), start=1):
        loss = target_loss(model, batch, prefix_length)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, _MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 10 == 0 or step == recipe.steps:
            recent = losses[-10:]
            pace_s = (time.monotonic() - started) / step
            report(
                f"step {step}/{recipe.steps}  loss {sum(recent) / len(recent):.3f}  {pace_s:.2f} s/step",
            )
    return model, losses


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` (bfloat16) into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    half = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(half, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.inference_mode = True
    config.base_model_name_or_path = BASE_NAME
    config.save_pretrained(str(directory))


def answers(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Row], batch: int = 32
) -> list[str]:
    """Greedy answers of the model as it stands, for a quick look before there is a server to ask."""
    texts: list[str] = []
    model.eval()
    end = end_of_turn(tokenizer)
    for start in range(0, len(rows), batch):
        prompts = [encode(tokenizer, task, row).prompt_ids for row in rows[start : start + batch]]
        width = max(map(len, prompts))
        ids_BT = torch.full((len(prompts), width), end)
        mask_BT = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
            mask_BT[row, width - len(prompt) :] = 1
        with torch.inference_mode():
            out_BT = model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=task.max_new_tokens,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
            )
        texts += tokenizer.batch_decode(out_BT[:, width:], skip_special_tokens=True)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--task", required=True, choices=sorted(TASKS), help="which task to learn")
    parser.add_argument(
        "--data", required=True, type=Path, help="folder with <task>.train.jsonl and .test.jsonl"
    )
    parser.add_argument("--base", required=True, type=Path, help="Hugging Face directory of the base model")
    parser.add_argument("--out", required=True, type=Path, help="where the adapter goes")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16, help="rows per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument(
        "--max-tokens", type=int, default=110, help="drop rows longer than this, the shared start apart"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument(
        "--check", type=int, default=0, help="then compare base and adapter on this many held-out rows"
    )
    arguments = parser.parse_args()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    task = TASKS[arguments.task]
    recipe = Recipe(
        steps=arguments.steps,
        batch=arguments.batch,
        learning_rate=arguments.lr,
        seed=arguments.seed,
        rank=arguments.rank,
        alpha=arguments.alpha,
        max_tokens=arguments.max_tokens,
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    # On such short rows the CPU's fused attention is the slower one, by a sixth of a step.
    base = AutoModelForCausalLM.from_pretrained(
        arguments.base, dtype=torch.bfloat16, attn_implementation="eager"
    )
    examples = [encode(tokenizer, task, row) for row in load_rows(arguments.data, task.name, "train")]
    prefix_length = shared_prefix(examples)
    examples = [example for example in examples if len(example) - prefix_length <= recipe.max_tokens]
    console.print(
        f"{task.name}: {len(examples)} rows, shared start {prefix_length} tokens, {recipe.steps} steps",
    )

    started = time.monotonic()
    model, losses = train(base, examples, recipe, console.print)
    save_adapter(model, arguments.out)
    facts = TrainingFacts(
        task=task.name,
        base=BASE_NAME,
        rows=len(examples),
        steps=recipe.steps,
        batch=recipe.batch,
        learning_rate=recipe.learning_rate,
        seed=recipe.seed,
        rank=recipe.rank,
        alpha=recipe.alpha,
        max_tokens=recipe.max_tokens,
        final_loss=round(sum(losses[-10:]) / len(losses[-10:]), 4),
    )
    save_facts(facts, arguments.out)
    write_card(arguments.out, task, facts, scores=None)
    console.print(f"{task.name}: saved to {arguments.out} after {time.monotonic() - started:.0f} s")

    if arguments.check:
        rows = load_rows(arguments.data, task.name, "test")[: arguments.check]
        tuned = answers(model, tokenizer, task, rows)
        with model.disable_adapter():
            untuned = answers(model, tokenizer, task, rows)
        console.print(
            f"{task.name}: {task.metric} on {len(rows)} held-out rows: "
            f"base {mean_score(task, rows, untuned):.3f}, fine-tuned {mean_score(task, rows, tuned):.3f}",
        )
        for row, before, after in list(zip(rows, untuned, tuned, strict=True))[:3]:
            console.print(f"  target {row.target!r}\n  base   {before!r}\n  tuned  {after!r}")


if __name__ == "__main__":
    main()
