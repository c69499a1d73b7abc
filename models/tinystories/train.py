"""Trains the decoder of this folder from text, on the CPU, in about an hour of one core.

    python -m qgraph.models.tinystories.train --text FILE [--text FILE ...] --output FOLDER

A text holds stories with <|endoftext|> between them (README.md says which texts the shipped weights saw). Of
the first one the stories from number 1555 on are held out: no story that quotes them is trained on, and
their perplexity is what the log reports. FOLDER becomes a Hugging Face model (config.json, tokenizer.json,
model.safetensors in float16), written anew at every report; a run that was stopped goes on from its
`checkpoint.pt` there, and may then be given another number of steps.

Matrices learn by Muon, https://kellerjordan.github.io/posts/muon (torch.optim.Muon), the embedding and the
norms by AdamW; the learning rate is constant and falls linearly to zero over the last part. What is written
and judged is the exponential moving average of the weights. Seeded: the same texts, number of steps and
machine give the same model.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qgraph.atomic import atomic_write
from qgraph.errors import UsageError
from qgraph.evaluate.perplexity import Window, perplexity, split_windows
from qgraph.models.tinystories import SEPARATOR

if TYPE_CHECKING:
    import numpy as np
    import torch

    from qgraph.evaluate.samples import InputSpec

FIRST_HELD_OUT = 1555  # story of the first text
CONTEXT = 512

VOCABULARY = 2048
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The defaults made the shipped weights."""

    steps: int = 1600
    tokens: int = 2048  # a step
    decay: float = 0.5  # share of the steps in which the learning rate falls to zero
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.0  # of what attention and MLP add to the residual stream
    average: float = 0.99  # of the weights, over steps
    seed: int = 0

    def rate(self, step: int) -> float:
        """The factor of the learning rates at a step from 0."""
        warm = min(1.0, (step + 1) / 50)
        return min(warm, (self.steps - step) / (self.decay * self.steps))

    def length(self, step: int) -> int:
        """Tokens of a row: attention to short ones costs less, and the long ones come when it matters."""
        return CONTEXT if step >= (1 - self.decay) * self.steps else CONTEXT // 2


# -- text ---------------------------------------------------------------------------------------------------


def read_stories(path: Path) -> list[str]:
    """The stories of a text, without empty ones and blank lines."""
    stories = (re.sub(r"\n\s*\n", "\n", s.strip()) for s in path.read_text("utf-8").split(SEPARATOR))
    return [story for story in stories if story]


def split_stories(texts: Sequence[Path]) -> tuple[list[str], list[str]]:
    """(to train on, held out). A story that shares three sentences of 40 letters or more with the held-out
    ones is in neither: one or two are stock phrases. Raises UsageError where nothing is left."""
    first = read_stories(texts[0])
    held_out = first[FIRST_HELD_OUT:]
    known = {sentence for story in held_out for sentence in _long_sentences(story)}
    others = first[:FIRST_HELD_OUT] + [story for path in texts[1:] for story in read_stories(path)]
    kept = [story for story in dict.fromkeys(others) if len(known & _long_sentences(story)) < 3]
    if not held_out or not kept:
        raise UsageError(f"{texts[0]}: {len(first)} stories; more than {FIRST_HELD_OUT} are needed")
    return kept, held_out


def _long_sentences(story: str) -> set[str]:
    return {s.strip() for s in re.split(r"[.!?\n]", story) if len(s.strip()) >= 40}


def train_tokenizer(stories: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE whose token 0 separates stories, and begins every text that it encodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        stories,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[SEPARATOR],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A", special_tokens=[(SEPARATOR, 0)]
    )
    return tokenizer


def batches(stories: Sequence[Sequence[int]], recipe: Recipe) -> Iterator[torch.Tensor]:
    """Token ids [tokens + 1] without end: epoch by epoch all stories in a new order, each behind token 0. The
    last token of a batch, which is only predicted there, is the first of the next."""
    import torch

    left = torch.zeros(0, dtype=torch.int64)
    epoch = 0
    while True:
        order = torch.randperm(len(stories), generator=torch.Generator().manual_seed(recipe.seed + epoch))
        ids = torch.tensor([token for i in order.tolist() for token in (0, *stories[i])])
        left = torch.cat([left, ids])
        epoch += 1
        while len(left) > recipe.tokens:
            yield left[: recipe.tokens + 1]
            left = left[recipe.tokens :]


# -- training -----------------------------------------------------------------------------------------------


class Trainer:
    """A model in training: `step` by step, `save`d as it is averaged."""

    def __init__(self, recipe: Recipe) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.model = LlamaForCausalLM(LlamaConfig(**MODEL))
        self.model.set_attn_implementation("eager")  # on the CPU and in bfloat16 a quarter faster to train
        self.averaged = LlamaForCausalLM(LlamaConfig(**MODEL)).eval()
        self.averaged.load_state_dict(self.model.state_dict())
        if recipe.dropout:
            for layer in self.model.model.layers:
                for block in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    block.register_forward_hook(self._drop)
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        norms = [p for p in self.model.parameters() if p.ndim == 1]
        embedding = {"params": [self.model.model.embed_tokens.weight], "weight_decay": recipe.weight_decay}
        self.optimizers = [
            torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=recipe.weight_decay),
            torch.optim.AdamW(
                [embedding, {"params": norms, "weight_decay": 0.0}], lr=recipe.other_rate, betas=(0.9, 0.95)
            ),
        ]
        self.done = 0

    def _drop(self, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.nn.functional.dropout(output, self.recipe.dropout, module.training)

    def step(self, ids: torch.Tensor) -> float:
        """Learns from `ids` [tokens + 1]; returns the loss in nats a token."""
        import torch

        factor = self.recipe.rate(self.done)
        rows = ids[:-1].view(-1, self.recipe.length(self.done))
        for optimizer, rate in zip(
            self.optimizers, (self.recipe.matrix_rate, self.recipe.other_rate), strict=True
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(input_ids=rows, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[1:])
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.done += 1
        keep = min(self.recipe.average, self.done / (self.done + 10))
        with torch.no_grad():
            for mean, now in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(now, 1 - keep)
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.done = state["done"]
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def save(self, folder: Path) -> None:
        """Writes config.json, generation_config.json and the averaged weights as float16."""
        import copy

        import torch

        copy.deepcopy(self.averaged).to(torch.float16).save_pretrained(folder)


class ModuleRunner:
    """A torch model for `qgraph.evaluate.perplexity`."""

    name = "torch"
    inputs: tuple[str, ...] = ("input_ids",)
    outputs: tuple[str, ...] = ("logits",)
    specs: tuple[InputSpec, ...] = ()

    def __init__(self, module: Any) -> None:
        self._module = module
        self.output_shapes: dict[str, tuple[int | str, ...]] = {}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode():
            logits = self._module(input_ids=torch.from_numpy(feeds["input_ids"]), use_cache=False).logits
        return {"logits": logits.numpy()}


def train(texts: Sequence[Path], output: Path, recipe: Recipe, report_every: int = 100) -> None:
    """See the module. Prints a line a report."""
    import torch

    stories, held_out = split_stories(texts)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(stories, VOCABULARY)
    tokenizer.save(str(output / "tokenizer.json"))
    encode = lambda some: [e.ids for e in tokenizer.encode_batch(some, add_special_tokens=False)]  # noqa: E731
    ids = encode(stories)
    windows: list[Window] = split_windows(encode(held_out), length=CONTEXT, stride=CONTEXT // 2, prefix=(0,))
    trainer = Trainer(recipe)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{parameters:,} parameters; {len(stories)} stories of {sum(map(len, ids)):,} tokens; "
        f"{len(held_out)} held out\n{json.dumps(asdict(recipe))}",
        flush=True,
    )
    checkpoint = output / "checkpoint.pt"
    if checkpoint.exists():
        trainer.restore(torch.load(checkpoint, weights_only=True))
        print(f"goes on after step {trainer.done}", flush=True)
    start, first, losses = time.monotonic(), trainer.done, []
    for number, part in enumerate(batches(ids, recipe)):
        if number < trainer.done:
            continue
        if trainer.done >= recipe.steps:
            break
        losses.append(trainer.step(part))
        if trainer.done % report_every == 0 or trainer.done == recipe.steps:
            trainer.save(output)
            with atomic_write(checkpoint) as temporary:
                torch.save(trainer.state(), temporary)
            found = perplexity(ModuleRunner(trainer.averaged), windows)
            speed = (trainer.done - first) * recipe.tokens / (time.monotonic() - start)
            print(
                f"step {trainer.done}: loss {sum(losses) / len(losses):.3f}, "
                f"held-out perplexity {found.perplexity:.3f} of {found.tokens} tokens, {speed:.0f} tokens/s",
                flush=True,
            )
            losses.clear()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="Default: of README.md.",
)
@click.option("--output", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--steps", default=Recipe.steps, show_default=True)
@click.option("--dropout", default=Recipe.dropout, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(texts: Sequence[Path], output: Path, steps: int, dropout: float, threads: int) -> None:
    """Trains the decoder of this folder."""
    import torch

    torch.set_num_threads(threads)
    train(texts, output, Recipe(steps=steps, dropout=dropout))


if __name__ == "__main__":
    main()
