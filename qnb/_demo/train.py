"""Trains the demo language model on the source of the Python standard library.

The weights beside this file came from two runs, each told how long it may take (Python 3.11.7, torch 2.13.0, two CPU
cores):

    python -m qnb._demo.train OUT --context 256 --batch 16 --minutes 55                           (16.4 M tokens)
    python -m qnb._demo.train OUT --context 512 --batch 8 --minutes 58 --resume OUT/checkpoint    (19.8 M tokens)

OUT then holds everything that `qnb.demo_lm` and `qnb.demo_texts` read: the weights in bf16, the tokenizer, and
`evaluation.jsonl` and `calibration.jsonl`. Those texts come from files that training never sees: a file is held out
when the SHA-256 of its path inside the library, modulo 50, is 0. The rule looks at nothing but the path, so a file
that is held out stays held out in every run, on every machine and in every version of Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sysconfig
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
VOCABULARY_SIZE = 4096

STRETCH_TOKENS = 500  # with the end-of-text token before it, a stretch fits a context of 512
STRETCHES = 64
STRETCHES_PER_FILE = 8
MAX_FILE_BYTES = 400_000  # the few files above this are generated tables

PEAK_LEARNING_RATE = 2.5e-3
WARM_UP_STEPS = 100
STEPS_PER_CHECKPOINT = 500


class SourceFile(NamedTuple):
    name: str  # path inside the library, with forward slashes
    text: str
    held_out: bool


class Stretch(NamedTuple):
    source: str  # name of the file that it was cut from
    text: str


def standard_library() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def digest(text: str) -> int:
    """SHA-256 of the text as a number: chance that is the same everywhere."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def is_held_out(name: str) -> bool:
    """Whether the file of this name is kept out of training: one in fifty is."""
    return digest(name) % 50 == 0


def source_files(library: Path) -> Iterator[SourceFile]:
    """Every .py file below `library` that is UTF-8 text, in the order of their paths.

    Left out: installed packages, which are not the library; and files that are wrong on purpose (lib2to3's test data
    and those named bad*), of which there are enough to teach wrong Python.
    """
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        name = relative.as_posix()
        if "site-packages" in relative.parts or "lib2to3/tests/data" in name or path.name.startswith("bad"):
            continue
        if path.stat().st_size >= MAX_FILE_BYTES:
            continue
        try:
            yield SourceFile(name, path.read_text("utf-8"), is_held_out(name))
        except UnicodeDecodeError:
            continue


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE tokenizer that begins every text with the end-of-text token, as training does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],  # the first token made, so its number is END_OF_TEXT_ID
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, END_OF_TEXT_ID)],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, context: int, out: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json. A text longer than the context is warned of, not cut."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)


def held_out_stretches(tokenizer: Tokenizer, files: Iterable[SourceFile]) -> dict[str, list[Stretch]]:
    """For "evaluation" and "calibration" each, up to 64 stretches of 500 tokens cut from held-out files.

    No file gives both kinds, and none more than 8 stretches. Which are taken, and in which order, is decided by
    digests of the texts and names, so it does not depend on how many other files there are.
    """
    stretches = []
    for file in files:
        offsets = tokenizer.encode(file.text, add_special_tokens=False).offsets
        for first in range(0, len(offsets) - STRETCH_TOKENS, STRETCH_TOKENS):
            begin, end = offsets[first][0], offsets[first + STRETCH_TOKENS - 1][1]
            stretches.append(Stretch(file.name, file.text[begin:end]))
    stretches.sort(key=lambda stretch: digest(stretch.text))
    taken: Counter[str] = Counter()
    kinds: dict[str, list[Stretch]] = {"evaluation": [], "calibration": []}
    for stretch in stretches:
        taken[stretch.source] += 1
        kind = kinds["calibration" if digest("half " + stretch.source) % 2 else "evaluation"]
        if taken[stretch.source] <= STRETCHES_PER_FILE and len(kind) < STRETCHES:
            kind.append(stretch)
    return kinds


def save_stretches(kinds: dict[str, list[Stretch]], out: Path) -> None:
    """Writes evaluation.jsonl and calibration.jsonl, one {"source", "text"} a line."""
    for kind, stretches in kinds.items():
        lines = (json.dumps(stretch._asdict()) + "\n" for stretch in stretches)
        (out / f"{kind}.jsonl").write_text("".join(lines), "utf-8")


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one row of token numbers (int32), the end-of-text token before each."""
    numbers: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        numbers += encoding.ids
    return torch.tensor(numbers, dtype=torch.int32)


def new_model(context: int) -> LlamaForCausalLM:
    """The architecture with fresh weights: 11.5 million parameters, the embedding shared with the output."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=320,
            intermediate_size=896,
            num_hidden_layers=8,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=END_OF_TEXT_ID,
            eos_token_id=END_OF_TEXT_ID,
            pad_token_id=END_OF_TEXT_ID,
        )
    )


def loss_of(model: torch.nn.Module, rows: torch.Tensor, device: str) -> torch.Tensor:
    """Mean cross-entropy, in nats, of each next token in `rows` (batch, context + 1); float32 but for bf16 matmuls."""
    rows = rows.long().to(device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokens: torch.Tensor, context: int, device: str) -> float | None:
    """Mean loss on up to 32 rows spread over the held-out tokens; None where they do not fill one row."""
    starts = range(0, len(tokens) - context, context + 300)[:32]
    if not starts:
        return None
    rows = torch.stack([tokens[start : start + context + 1] for start in starts])
    losses = [loss_of(model, batch, device).item() * len(batch) for batch in rows.split(8)]
    return sum(losses) / len(rows)


def learning_rate(step: int, done: float, tail: float) -> float:
    """The rate at `step`, the share `done` of the time gone: warm-up, flat, then linear down over the last `tail`."""
    return PEAK_LEARNING_RATE * min(1, (step + 1) / WARM_UP_STEPS) * max(0.02, min(1, (1 - done) / tail))


def train(
    model: LlamaForCausalLM, tokens: torch.Tensor, held_out_tokens: torch.Tensor, options: argparse.Namespace
) -> int:
    """Changes `model`: trains it until the time is up, with a checkpoint now and then. Returns the number of steps."""
    trained = torch.compile(model) if options.compile else model
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    # A resumed run starts from trained weights: most of its time goes to bringing the rate down.
    tail = 0.8 if options.resume else 0.45
    start, step = time.monotonic(), 0
    while (done := (time.monotonic() - start) / (60 * options.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, done, tail)
        begins = torch.randint(0, len(tokens) - options.context - 1, (options.batch,)).tolist()
        rows = torch.stack([tokens[begin : begin + options.context + 1] for begin in begins])
        loss = loss_of(trained, rows, options.device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % STEPS_PER_CHECKPOINT == 0:
            held_out = held_out_loss(model, held_out_tokens, options.context, options.device)
            print(
                f"step {step}, {step * options.batch * options.context / 1e6:.1f} M tokens, "
                f"{time.monotonic() - start:.0f} s, loss {loss.item():.3f}, "
                f"held out {'too short' if held_out is None else format(held_out, '.3f')}",
                flush=True,
            )
            model.save_pretrained(options.out / "checkpoint")
    return step


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains the demo language model on the Python standard library's source."
    )
    parser.add_argument("out", type=Path, help="folder for the weights, the tokenizer and the held-out texts")
    parser.add_argument(
        "--library", type=Path, default=standard_library(), help="folder of Python source (%(default)s)"
    )
    parser.add_argument("--context", type=int, default=512, help="tokens in a row (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rows in a step (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="how long to train (%(default)s)")
    parser.add_argument("--resume", type=Path, help="folder of an earlier run's weights to go on from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="slower, but starts at once")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    torch.manual_seed(0)
    files = list(source_files(options.library))
    training = [file.text for file in files if not file.held_out]
    held_out = [file for file in files if file.held_out]
    options.out.mkdir(parents=True, exist_ok=True)
    saved = options.out / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(saved)) if saved.exists() else train_tokenizer(training)
    save_tokenizer(tokenizer, options.context, options.out)
    save_stretches(held_out_stretches(tokenizer, held_out), options.out)

    tokens = token_stream(tokenizer, training)
    held_out_tokens = token_stream(tokenizer, [file.text for file in held_out])
    if len(tokens) < options.context + 2:
        raise SystemExit(
            f"{options.library} holds {len(tokens)} tokens of training text: a context of {options.context} needs "
            "more; give a larger --library or a smaller --context"
        )
    model = LlamaForCausalLM.from_pretrained(options.resume) if options.resume else new_model(options.context)
    model.config.max_position_embeddings = options.context
    model.to(options.device)
    steps = train(model, tokens, held_out_tokens, options)
    model.to(torch.bfloat16).save_pretrained(options.out)
    print(f"{steps} steps, {steps * options.batch * options.context / 1e6:.1f} M tokens: wrote {options.out}")


if __name__ == "__main__":
    main()
