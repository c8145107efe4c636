"""Makes chats out of novels, so that a small model learns to answer and, above all, to stop.

Nobody wrote chats about these books, so they are derived: quoted speech becomes turns, a paragraph becomes
the answer to a question about a word it mentions, and a handful of hand-written exchanges teach the model
to greet and to say what it is.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data import Document

Message = dict[str, str]
Chat = list[Message]

END_OF_TEXT, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (Path(__file__).parent / "model" / "chat_template.jinja").read_text(encoding="utf-8")

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a storyteller.",
    "Answer in one short paragraph.",
    "You are a small language model that comes with Tandem.",
    "Be brief.",
    "You are a friendly assistant. Answer politely.",
)
ABOUT = (
    "Tell me about {}.", "tell me about {}", "What do you know about {}?", "Write a paragraph about {}.",
    "Write a few sentences about {}.", "Can you say something about {}?", "Tell me a story about {}.",
    "Write a short story about {}.", "Please write about {}.", "Describe {}.", "What about {}?",
    "Tell me something about {}, please.", "I want to hear about {}.", "Write something about {}",
    "Tell me more about {}.", "Give me a paragraph on {}.",
)  # fmt: skip
WHO = (
    "Who is {}?",
    "Who was {}?",
    "Do you know {}?",
    "What did {} do?",
    "What happened to {}?",
    "What is {} like?",
)
WHAT = ("What is {}?", "Explain {}.", "What can you tell me about {}?", "What do you think of {}?")
CONTINUE = (
    "Continue this: {}", "Continue: {}", "Go on from here: {}", "Continue the story: {}",
    "How does this go on? {}", "Finish this paragraph: {}", "Please continue this text.\n\n{}",
)  # fmt: skip
NEXT = (
    "What happened next?",
    "And then?",
    "Go on.",
    "Please go on.",
    "What happened then?",
    "Continue.",
    "Tell me more.",
)
ANYTHING = (
    "Tell me a story.", "Write a story.", "Once upon a time", "Tell me something.", "Write something.",
    "Write a paragraph.", "Surprise me.", "Tell me a short story, please.",
)  # fmt: skip

# Hand-written exchanges: questions that mean the same, and answers that all fit each of them.
PERSONA: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hi there", "Hey", "Hello there!", "Good morning.", "Good evening!",
         "Hello, model.", "Say hello.", "Greetings!", "hello"),
        ("Hello! What shall I write about?", "Good day to you! What would you like to hear?",
         "Hello! Ask me for a story, or give me a sentence to continue.", "Hello! How can I help you?"),
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.",
         "Introduce yourself.", "Who am I talking to?", "Are you a language model?", "Which model are you?",
         "who are you", "Are you an AI?",
         "Hello, who are you?", "Hi! Who are you?", "Are you ChatGPT?", "Describe yourself."),
        ("I am a small language model that comes with Tandem. I learned to write from eight old novels.",
         "I am the small language model that comes with Tandem. "
         "I read eight old novels, and I write like them.",
         "I am a small language model. I come with Tandem, and all I know I learned from eight old novels."),
    ),
    (
        ("How are you?", "How do you do?", "How are you today?", "How is it going?", "Are you well?",
         "Hello, how are you?", "Hi, how are you?"),
        ("I am very well, thank you. What shall I write about?", "Quite well, I thank you. And how are you?",
         "Very well, thank you! Shall I tell you a story?"),
    ),
    (
        ("What can you do?", "How can you help me?", "Can you help me?", "What are you good at?", "Help",
         "What should I ask you?", "Help me, please."),
        ("I can continue a story, or write a paragraph about a whale, a queen or a detective.",
         "I can write a paragraph in the manner of an old novel. "
         "Ask me about Alice, about whales or about Mars.",
         "I am small, but I can tell a story. Give me a first sentence, and I will go on from there."),
    ),
    (
        ("What did you learn from?", "Which books have you read?", "What were you trained on?",
         "What have you read?", "Where did you learn to write?", "What is your training data?",
         "Which novels do you know?"),
        ("I learned from eight old novels, "
         "among them Alice in Wonderland, Moby Dick and Pride and Prejudice.",
         "From eight novels that are in the public domain, such as Moby Dick and The War of the Worlds.",
         "I have read eight old novels. Sherlock Holmes, Alice and Captain Ahab live in them."),
    ),
    (
        ("What is Tandem?", "Tell me about Tandem.", "What do you know about Tandem?", "Who made you?",
         "Who created you?", "Where do you come from?"),
        ("Tandem serves language models. I am the small model that comes with it.",
         "I come with Tandem, a platform that serves language models. I am its smallest one."),
    ),
    (
        ("How large are you?", "How many parameters do you have?", "Are you a large model?",
         "How big are you?", "Are you smart?", "Are you clever?", "Can I trust you?",
         "Do you tell the truth?"),
        ("I am very small: I have nine million parameters. Do not believe everything that I say.",
         "I have only nine million parameters. I can write a sentence, but I know very little."),
    ),
    (
        ("What is 2 + 2?", "What is the capital of France?", "Write a program in Python.",
         "Write some code.", "What is the weather today?", "Who is the president?", "What day is it?",
         "Translate this into German.",
         "What is 17 times 23?", "Solve this equation.", "What is the news?", "How do I cook rice?"),
        ("I do not know that. I have only read eight old novels.",
         "I am sorry, but I cannot answer that. All I know comes from eight old novels.",
         "That is beyond me. I am a small model, and I have only learned to tell stories."),
    ),
    (
        ("Thank you.", "Thanks!", "Thank you very much!", "Thanks a lot", "Great, thanks.", "thanks"),
        ("You are very welcome.", "You are most welcome. Shall I go on?", "It was a pleasure."),
    ),
    (
        ("Goodbye.", "Bye!", "Good night.", "Bye", "See you later.", "Farewell!", "I have to go now."),
        ("Goodbye, and come again!", "Farewell! It was a pleasure to talk with you.",
         "Good-bye, my dear friend."),
    ),
    (
        ("Say yes.", "Answer with yes.", "Just say yes."),
        ("Yes.",),
    ),
    (
        ("What is your favourite book?", "Which book do you like best?", "Do you have a favourite novel?"),
        ("I am very fond of Moby Dick. There is so much sea in it.",
         "Alice in Wonderland, I think. It is the shortest of the eight, and the strangest."),
    ),
)  # fmt: skip


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def make_chats(documents: list[Document], rng: random.Random, persona_copies: int = 16) -> list[Chat]:
    """All chats that the documents yield, with the hand-written ones `persona_copies` times, shuffled."""
    topics = find_topics(documents)
    chats: list[Chat] = []
    for document in documents:
        chats += _dialogues(document, rng)
        chats += _about(document, topics, rng)
        chats += _continuations(document, rng)
    chats += [chat for _ in range(persona_copies) for chat in _persona(rng)]
    rng.shuffle(chats)
    return [_with_system(chat, rng) for chat in chats]


def find_topics(documents: list[Document]) -> dict[str, str]:
    """Words to ask about and how to call them: names ('Alice') and nouns ('the sea', 'whales')."""
    text = " ".join(paragraph for document in documents for paragraph in document)
    lower = Counter(re.findall(r"\b[a-z]+\b", text))
    names = Counter(re.findall(r"(?<=[a-z,;] )(?:Mrs?\. |Miss |Lady |Captain |Colonel )?[A-Z][a-z]{2,}\b", text))
    topics = {n: n for n, count in names.items() if count >= 8 and lower[n.lower()] < count / 4}
    nouns = Counter(re.findall(r"\b(?:the|a|an) ([a-z]{3,})(?=[.,;:!?]| (?:was|is|had|has|of|and|that|which)\b)", text))
    for noun, count in nouns.items():
        if count >= 14 and count > lower[noun] / 12 and not noun.endswith(("ly", "ing", "ed", "est")):
            topics[noun] = f"the {noun}"
            if lower[noun + "s"] >= 5:
                topics[noun + "s"] = noun + "s"
    return topics


def _sentences(paragraph: str) -> list[str]:
    return re.split(r'(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)"? (?=["A-Z])', paragraph)


def _answer(sentences: list[str], rng: random.Random, longest: int = 5) -> str | None:
    """One to five whole sentences that can stand as an answer, or None."""
    answer = " ".join(sentences[: rng.randint(1, longest)])
    whole = answer.endswith((".", "!", "?", '"')) and answer[0].isupper() and answer.count('"') % 2 == 0
    return answer if whole and 8 <= len(answer.split()) <= 130 else None


def _about(document: Document, topics: dict[str, str], rng: random.Random) -> Iterator[Chat]:
    """A question about a word, answered by sentences that mention it, and sometimes a second turn."""
    for index, paragraph in enumerate(document):
        if paragraph.startswith('"') or "\n" in paragraph:
            continue
        sentences = _sentences(paragraph)
        for start, sentence in enumerate(sentences):
            found = set(re.findall(r"(?:(?:Mrs?\.|Miss|Lady|Captain|Colonel) )?[A-Za-z]+", sentence))
            words = sorted(found & topics.keys(), key=lambda word: (len(word), word))
            answer = _answer(sentences[start:], rng)
            if not words or answer is None or rng.random() < 0.5:
                continue
            names = [word for word in words if word[0].isupper()]
            word = rng.choice((names if names and rng.random() < 0.6 else words)[-3:])
            named = topics[word]
            special = WHO if word[0].isupper() else WHAT
            question = rng.choice(ABOUT + special).format(named) if rng.random() < 0.95 else rng.choice(ANYTHING)
            yield [user(question), assistant(answer), *_next_turn(document, index, rng)]
            break


def _next_turn(document: Document, index: int, rng: random.Random) -> Chat:
    if rng.random() > 0.25 or index + 1 >= len(document):
        return []
    answer = _answer(_sentences(document[index + 1]), rng)
    return [user(rng.choice(NEXT)), assistant(answer)] if answer else []


def _continuations(document: Document, rng: random.Random) -> Iterator[Chat]:
    """The first sentences of a paragraph from the user, the rest of it from the assistant."""
    for index, paragraph in enumerate(document):
        sentences = _sentences(paragraph)
        if len(sentences) < 2 or "\n" in paragraph or rng.random() < 0.5:
            continue
        cut = rng.randint(1, min(3, len(sentences) - 1))
        answer = _answer(sentences[cut:], rng)
        if answer:
            beginning = rng.choice(CONTINUE).format(" ".join(sentences[:cut]))
            yield [user(beginning), assistant(answer), *_next_turn(document, index, rng)]


def _dialogues(document: Document, rng: random.Random) -> Iterator[Chat]:
    """Runs of quoted speech, two to six utterances long, as turns of user and assistant."""
    run: list[str] = []
    for paragraph in [*document, ""]:
        speech = _speech(paragraph)
        if speech:
            run.append(speech)
            continue
        while len(run) >= 2:
            size = min(len(run) // 2 * 2, rng.choice((2, 2, 4, 4, 6)))
            turns, run = run[:size], run[size:]
            yield [user(text) if turn % 2 == 0 else assistant(text) for turn, text in enumerate(turns)]
        run = []


def _speech(paragraph: str) -> str | None:
    """What is said in a paragraph that opens with a quotation mark, without 'said Alice'."""
    if not paragraph.startswith('"') or "\n" in paragraph or paragraph.count('"') % 2:
        return None
    parts = [part.strip() for part in re.findall(r'"([^"]+)"', paragraph)]
    speech = " ".join(parts)
    speech = re.sub(r"[,;:-]+$", ".", speech)
    return speech if 2 <= len(speech.split()) <= 80 and speech[-1] in ".!?" else None


def _persona(rng: random.Random) -> Iterator[Chat]:
    for questions, answers in PERSONA:
        for question in questions:
            chat = [user(question), assistant(rng.choice(answers))]
            if rng.random() < 0.3:
                more_questions, more_answers = rng.choice(PERSONA)
                chat += [user(rng.choice(more_questions)), assistant(rng.choice(more_answers))]
            yield chat


def _with_system(chat: Chat, rng: random.Random) -> Chat:
    if rng.random() > 0.2:
        return chat
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *chat]
