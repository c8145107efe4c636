"""Trains the small language model that comes with Tandem, on a CPU, from eight old novels.

A serving platform needs a model that can be shipped with it, that starts at once and whose origin is known
to the last byte. This script makes one: it trains the tokenizer, then a nine million parameter Llama on prose
and on chats derived from the prose, and writes a folder that `transformers` loads like any other model.
"""

import argparse
import copy
import json
import math
import random
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from batches import CONTEXT, IGNORED, VOCABULARY, Prose, Sequence, batches, encode_chat, train_tokenizer
from chats import PERSONA, make_chats
from data import Corpus, as_text, load_corpus
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).parent
SHORT_WINDOW = 512
REPORT_EVERY = 100  # steps
EXAMPLES = """examples:
  python examples/small_model/train.py --out examples/small_model/model
  python examples/small_model/train.py --out /tmp/quick --steps 200      # a first look in some minutes
  python examples/small_model/train.py --out /tmp/fast --threads 8
"""


@dataclass
class Record:
    """What a run did; written beside the weights so that every published figure has a source."""

    settings: dict[str, object] = field(default_factory=dict)
    parameters: int = 0
    prose_tokens: int = 0
    chat_tokens: int = 0
    held_out_tokens: int = 0
    held_out_bytes: int = 0
    steps: int = 0
    tokens_seen: int = 0
    minutes: float = 0.0
    tokens_per_second: float = 0.0
    train_loss: float = 0.0
    held_out_loss: float = math.inf
    held_out_perplexity_per_token: float = 0.0
    held_out_perplexity_per_byte: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--corpus", type=Path, default=HERE / "corpus", help="folder with the novels")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon", help="default: %(default)s")
    parser.add_argument("--dropout", type=float, default=0.05, help="on every block's output (default: %(default)s)")
    parser.add_argument("--chat-share", type=float, default=0.23, help="of the tokens (default: %(default)s)")
    parser.add_argument("--long-share", type=float, default=0.12, help="of the steps, at full context")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="default: %(default)s")
    return parser.parse_args()


def build_model(tokenizer: PreTrainedTokenizerFast, dropout: float) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=960,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    if dropout:
        for layer in model.model.layers:
            for block in (layer.self_attn.o_proj, layer.mlp):
                block.register_forward_hook(lambda m, _, out: F.dropout(out, dropout, training=m.training))
    return model


def summed_loss(model: LlamaForCausalLM, inputs: Tensor, labels: Tensor, rows: int = 512) -> Tensor:
    """Summed cross-entropy; logits of about `rows` tokens at a time, so that they stay in the cache."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        count = max(1, len(hidden) // rows)
        parts = zip(hidden.chunk(count), labels.flatten().chunk(count), strict=True)
        losses = [
            F.cross_entropy(model.lm_head(part).float(), label, ignore_index=IGNORED, reduction="sum")
            for part, label in parts
        ]
    return torch.stack(losses).sum()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: list[int], length: int) -> float:
    """Mean loss in nats a token over all held-out text, read in windows of `length` tokens."""
    model.train(False)
    total = 0.0
    for start in range(0, len(stream) - 1, length):
        ids = torch.tensor([stream[start : start + length + 1]])
        total += summed_loss(model, ids[:, :-1], ids[:, 1:]).item()
    model.train()
    return total / (len(stream) - 1)


def build_optimizers(model: LlamaForCausalLM, kind: str, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW for embeddings and norms; the matrices between them get Muon, which needs fewer steps."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    embeddings = [p for n, p in model.named_parameters() if "embed" in n]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": embeddings, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    if kind == "adamw":
        groups.append({"params": matrices, "weight_decay": 0.1})
        return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98)), muon]


def lr_factor(step: int, steps: int) -> float:
    """Warm-up over 4 % of the steps, a plateau to the middle, then down to nearly nothing."""
    return min((step + 1) / (0.04 * steps), 1.0, 0.02 + 2 * (steps - step) / steps * 0.98)


class Run:
    """One training run: it counts, reports, and keeps the weights that did best on held-out text."""

    def __init__(
        self,
        options: argparse.Namespace,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        record: Record,
    ) -> None:
        self.options, self.model, self.tokenizer, self.record = options, model, tokenizer, record
        self.best: dict[str, Tensor] = copy.deepcopy(model.state_dict())
        self.started = time.monotonic()
        self.recent: list[float] = []

    def train(self, prose: Prose, chats: list[Sequence], held_out: list[int]) -> None:
        """Short windows first, then full context; the best weights are those of the last stage."""
        steps = self.options.steps
        optimizers = build_optimizers(self.model, self.options.optimizer, self.options.lr)
        rng = random.Random(self.options.seed)
        first_long = round(steps * (1 - self.options.long_share))
        for length, stage in ((SHORT_WINDOW, range(first_long)), (CONTEXT, range(first_long, steps))):
            rows = max(1, self.options.batch_tokens // length)
            source = batches(prose, chats, length, rows, self.options.chat_share, rng)
            self.record.held_out_loss = math.inf
            for step in stage:
                self.step(optimizers, *next(source), lr_factor(step, steps))
                self.record.steps = step + 1
                if (step + 1) % REPORT_EVERY == 0 or step + 1 == stage.stop:
                    self.report(held_out, length)
                    self.publish(self.model)

    def step(self, optimizers: list[torch.optim.Optimizer], x: Tensor, y: Tensor, factor: float) -> None:
        loss = summed_loss(self.model, x, y) / (y != IGNORED).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.options.lr * factor
            optimizer.step()
            optimizer.zero_grad()
        self.recent.append(loss.item())
        self.record.tokens_seen += x.numel()

    def report(self, held_out: list[int], length: int) -> None:
        """Measure on held-out text, remember the weights if they are the best yet, print a line."""
        record, seconds = self.record, time.monotonic() - self.started
        loss = held_out_loss(self.model, held_out, length)
        train_loss = sum(self.recent) / len(self.recent)
        self.recent = []
        record.curve.append({"step": record.steps, "train_loss": train_loss, "held_out_loss": loss})
        if loss < record.held_out_loss:
            record.held_out_loss, record.train_loss = loss, train_loss
            self.best = copy.deepcopy(self.model.state_dict())
        record.minutes = seconds / 60
        record.tokens_per_second = record.tokens_seen / seconds
        left = seconds / record.steps * (self.options.steps - record.steps) / 60
        print(
            f"step {record.steps:5d}/{self.options.steps}  {record.tokens_per_second:6.0f} tokens/s  "
            f"loss {train_loss:.3f}  held-out loss {loss:.3f} ppl {math.exp(loss):6.1f}  ETA {left:.1f} min",
            flush=True,
        )

    def publish(self, model: LlamaForCausalLM) -> None:
        """Write a complete model folder, so that there is one to use long before the run is over."""
        record = self.record
        if math.isinf(record.held_out_loss):
            return
        nats = record.held_out_loss * (record.held_out_tokens - 1)
        record.held_out_perplexity_per_token = math.exp(record.held_out_loss)
        record.held_out_perplexity_per_byte = math.exp(nats / record.held_out_bytes)
        publish(model, self.tokenizer, record, self.options.out)


def publish(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: Record, out: Path) -> None:
    """Write the model beside `out` and swap it in; a model card that already lies there is kept."""
    fresh, old = out.with_name(out.name + ".tmp"), out.with_name(out.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    saved = copy.deepcopy(model)
    saved.to(torch.bfloat16)  # type: ignore[arg-type]
    saved.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.bos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    saved.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    special = {"additional_special_tokens": tokenizer.all_special_tokens, "extra_special_tokens": None}
    _amend(fresh / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", **special)
    _amend(fresh / "config.json", rope_theta=10000.0, torch_dtype="bfloat16")
    (fresh / "model.safetensors").chmod(0o644)
    (fresh / "training.json").write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    if (out / "README.md").exists():
        shutil.copy2(out / "README.md", fresh)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _amend(file: Path, **entries: object) -> None:
    """Put entries that readers other than the newest transformers look for; None drops one."""
    content = json.loads(file.read_text(encoding="utf-8")) | entries
    content = {name: value for name, value in content.items() if value is not None}
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def prepare(corpus: Corpus, options: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, Prose, list[Sequence]]:
    """Tokenizer, prose and chats; all three come from the training part of the novels alone."""
    chats = make_chats(corpus.train, random.Random(options.seed))
    spoken = [" ".join(questions + answers) for questions, answers in PERSONA]
    tokenizer = train_tokenizer([as_text(document) for document in corpus.train] + spoken * 5)
    return tokenizer, Prose(corpus.train, tokenizer), [encode_chat(chat, tokenizer) for chat in chats]


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    corpus = load_corpus(options.corpus)
    tokenizer, prose, chats = prepare(corpus, options)
    held_out = Prose(corpus.held_out, tokenizer).stream
    model = build_model(tokenizer, options.dropout)
    record = Record(
        settings={k: v for k, v in vars(options).items() if not isinstance(v, Path)},
        parameters=sum(p.numel() for p in model.parameters()),
        prose_tokens=len(prose.stream),
        chat_tokens=sum(len(ids) for ids, _ in chats),
        held_out_tokens=len(held_out),
        held_out_bytes=len(str(tokenizer.decode(held_out, skip_special_tokens=True)).encode()),
    )
    print(
        f"{record.parameters:,} parameters; prose {record.prose_tokens:,}, chats {record.chat_tokens:,} "
        f"and held-out text {record.held_out_tokens:,} tokens",
        flush=True,
    )
    run = Run(options, model, tokenizer, record)
    try:
        run.train(prose, chats, held_out)
    except KeyboardInterrupt:
        print("stopped; the best weights so far are written")
    model.load_state_dict(run.best)
    run.publish(model)
    print(
        f"held-out perplexity {record.held_out_perplexity_per_token:.2f} a token, "
        f"{record.held_out_perplexity_per_byte:.3f} a byte; written to {options.out}"
    )


if __name__ == "__main__":
    main()
