"""Shows what a trained model writes and measures what a chat needs most: that its answers end.

Perplexity says how well a model predicts; it does not say whether answers stop or whether text far into the
context still reads well. This script does, with fixed prompts and a fixed seed.
"""

import argparse
import json
import lzma
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

HERE = Path(__file__).parent
PROSE = (
    "It was a dark and stormy night, and",
    "The captain looked at the whale and",
    '"My dear Watson,"',
    "Alice opened the door and found",
)
CHATS = (
    "Hello!", "Who are you?", "What can you do?", "Tell me about Alice.", "Write a paragraph about whales.",
    "Continue this: The Martians came down the road in the night.", "Who is Mr. Darcy?", "How are you today?",
    "What is the capital of France?", "Tell me a story.", "Describe the sea.", "Thank you!",
    "What happened to Captain Ahab?", "hi, what is your name?", "I am so tired today.", "Do you like London?",
)  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python examples/small_model/check.py --model examples/small_model/model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=HERE / "model", help="folder of the model")
    parser.add_argument("--samples", type=int, default=2, help="sampled answers a prompt")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


class Speaker:
    """A loaded model and its tokenizer, ready to write."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
        self.model.train(False)

    def write(self, ids: list[int], tokens: int, greedy: bool = False) -> list[int]:
        """The tokens that follow `ids`, with the sampling settings that the model folder recommends."""
        given = torch.tensor([ids])
        out = self.model.generate(  # type: ignore[operator]
            given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=not greedy
        )
        return [int(token) for token in out[0, len(ids) :]]

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def chat_ids(self, question: str) -> list[int]:
        messages = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer.encode(str(text), add_special_tokens=False))


def show_prose(speaker: Speaker) -> None:
    print("## Prose, sampled")
    for prompt in PROSE:
        ids = speaker.tokenizer.encode(prompt, add_special_tokens=False)
        print(f"- **{prompt}**{speaker.text(speaker.write(ids, 90))}\n")


def show_chats(speaker: Speaker, samples: int) -> None:
    """Print one greedy and one sampled answer a prompt, then the share of answers that ended."""
    print("## Chats")
    end = speaker.tokenizer.eos_token_id
    ended = asked = 0
    for question in CHATS:
        ids = speaker.chat_ids(question)
        answers = [speaker.write(ids, 300, greedy=True)]
        answers += [speaker.write(ids, 300) for _ in range(samples)]
        ended += sum(answer[-1] == end for answer in answers)
        asked += len(answers)
        print(f"- **{question}**\n  greedy: {speaker.text(answers[0])}\n  sampled: {speaker.text(answers[-1])}")
    print(f"\n{ended} of {asked} answers ended within 300 tokens\n")


@torch.no_grad()
def show_long(speaker: Speaker) -> None:
    """Loss by position over long windows of a novel, and a continuation at position 1,900."""
    print("## Far into the context")
    with lzma.open(HERE / "corpus" / "war_of.txt.xz", "rt", encoding="utf-8") as file:
        raw = file.read()
    text = " ".join(raw[len(raw) // 3 :][:60000].split())
    ids = speaker.tokenizer.encode(text, add_special_tokens=False)
    windows = torch.tensor([ids[start : start + 2048] for start in range(0, 3 * 2048, 2048)])
    losses = torch.nn.functional.cross_entropy(
        speaker.model(windows).logits[:, :-1].float().transpose(1, 2), windows[:, 1:], reduction="none"
    ).mean(0)
    spans = {f"{a}-{a + 256}": round(losses[a : a + 256].mean().item(), 2) for a in range(0, 2047, 256)}
    print(f"loss by position (text seen in training): {json.dumps(spans)}")
    print(f"...{speaker.text(ids[1860:1900])}**{speaker.text(speaker.write(ids[:1900], 120))}**")


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(7)
    speaker = Speaker(options.model)
    show_prose(speaker)
    show_chats(speaker, options.samples)
    show_long(speaker)


if __name__ == "__main__":
    main()
