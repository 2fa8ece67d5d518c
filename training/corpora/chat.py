"""Short conversations in a narrow domain with checkable answers: what mpt-tiny-chat is trained on and scored with.

The assistant greets, remembers what it is told (name, favourites, home, a pet, a number), answers a small set of facts,
adds and subtracts single digits, says that it does not know the rest, and says goodbye. The right answer to a turn is a
function of the turns before it, so a generated conversation can be scored exactly.
"""

import random
from dataclasses import dataclass, field

from mpt.prompts import MPT_7B_CHAT_SYSTEM, MPT_30B_CHAT_SYSTEM, Message
from training.corpora import words

UNKNOWN = "I am sorry, I do not know that."
ABOUT_ME = "I am MPT-Tiny, a very small chat model."
HELP = "I can remember what you tell me, add small numbers, and answer questions about capitals and about MPT."

SYSTEM_PROMPTS = (
    MPT_30B_CHAT_SYSTEM,
    MPT_7B_CHAT_SYSTEM,
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer shortly.",
    "You are MPT-Tiny, a very small chat model.",
)

_CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Austria": "Vienna", "Greece": "Athens", "Poland": "Warsaw", "Hungary": "Budapest",
    "Russia": "Moscow", "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Egypt": "Cairo",
    "Kenya": "Nairobi", "Canada": "Ottawa", "Mexico": "Mexico City", "Brazil": "Brasilia", "Peru": "Lima",
    "Chile": "Santiago", "Cuba": "Havana", "Australia": "Canberra", "Turkey": "Ankara", "Belgium": "Brussels",
}  # fmt: skip
_CAPITAL_QUESTIONS = (
    "What is the capital of {x}?", "what is the capital of {x}", "What's the capital of {x}?", "Capital of {x}?",
    "Which city is the capital of {x}?", "Tell me the capital of {x}.", "Do you know the capital of {x}?",
    "Can you tell me the capital of {x}?", "Name the capital of {x}.", "{x}'s capital?",
)  # fmt: skip
# Questions that all have the same answer.
_FACTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Who are you?", "What are you?", "What is your name?", "what's your name?", "Tell me about yourself.",
      "Introduce yourself.", "Do you have a name?", "Are you a robot?", "Are you human?"), ABOUT_ME),
    (("What can you do?", "How can you help me?", "Help", "What do you know?", "What are you able to do?",
      "Can you help me?", "What can I ask you?"), HELP),
    (("Who made you?", "Who trained you?", "Where do you come from?", "Who built you?", "Who created you?"),
     "I was trained with the MPT recipes on two CPU cores."),
    (("What is MPT?", "What does MPT mean?", "What does MPT stand for?", "Explain MPT.", "What is an MPT?",
      "Tell me what MPT is."), "MPT is the MosaicML Pretrained Transformer."),
    (("What is ALiBi?", "what is alibi?", "What does ALiBi do?", "Explain ALiBi.", "How does ALiBi work?",
      "Tell me about ALiBi."), "ALiBi adds a penalty for distance to the attention scores."),
    (("What is the context length of StoryWriter?", "How many tokens can StoryWriter read?",
      "What is StoryWriter's context length?", "How long is the context of MPT-7B-StoryWriter?"),
     "StoryWriter was trained with a context of 65,536 tokens."),
    (("What is the licence of MPT-7B?", "Which license does MPT-7B have?", "Is MPT-7B open source?",
      "How is MPT-7B licensed?", "What is the license of MPT-7B?"), "MPT-7B has the Apache 2.0 licence."),
    (("Can I use MPT-7B commercially?", "Is MPT-7B free for commercial use?", "May I use MPT-7B in a product?"),
     "Yes, MPT-7B may be used commercially."),
    (("Can I use MPT-7B-Chat commercially?", "Is MPT-7B-Chat free for commercial use?",
      "May I use MPT-7B-Chat in a product?"), "No, MPT-7B-Chat is for non-commercial use only."),
    (("How many parameters does MPT-7B have?", "How large is MPT-7B?", "How big is MPT-7B?", "What size is MPT-7B?"),
     "MPT-7B has 6.7 billion parameters."),
    (("How many parameters does MPT-30B have?", "How large is MPT-30B?", "How big is MPT-30B?"),
     "MPT-30B has 30 billion parameters."),
    (("How many parameters do you have?", "How large are you?", "How big are you?", "How many weights do you have?"),
     "I have about 4 million parameters."),
    (("How many tokens was MPT-7B trained on?", "On how many tokens was MPT-7B trained?",
      "How much text was MPT-7B trained on?"), "MPT-7B was trained on 1 trillion tokens."),
    (("What colour is the sky?", "What color is the sky?", "Which colour does the sky have?"), "The sky is blue."),
    (("What colour is grass?", "What color is grass?", "Which colour does grass have?"), "Grass is green."),
    (("What colour is snow?", "What color is snow?", "Which colour does snow have?"), "Snow is white."),
    (("What colour is a lemon?", "What color is a lemon?", "What colour are lemons?"), "A lemon is yellow."),
    (("How many days are in a week?", "How many days does a week have?"), "A week has 7 days."),
    (("How many months are in a year?", "How many months does a year have?"), "A year has 12 months."),
    (("How are you?", "How are you doing?", "how are you today?", "How do you do?", "How is it going?"),
     "I am doing well, thank you."),
    (("Thanks", "Thank you", "Thank you very much.", "thanks a lot", "Thanks!", "Thank you!"), "You are welcome."),
    (("Tell me a joke.", "Do you know a joke?", "Make me laugh."),
     "Why did the token stop? It met the end of the text."),
)  # fmt: skip
_GREETINGS = ("Hello", "Hi", "Hey", "Hello!", "Hi!", "Hello there", "Hi there!", "Good morning", "Good evening",
              "Good afternoon!", "hello", "hi", "Hey there")  # fmt: skip
_GOODBYES = ("Goodbye", "Bye", "Bye!", "Goodbye!", "See you later.", "bye bye", "See you!", "I have to go now.",
             "Good night", "That is all. Goodbye.")  # fmt: skip
_TELL_NAME = ("My name is {x}.", "My name is {x}", "I am {x}.", "I'm {x}", "I'm {x}.", "Call me {x}.", "my name is {x}",
              "You can call me {x}.", "Please call me {x}.", "The name is {x}.", "People call me {x}.",
              "Hello, my name is {x}.", "Hi, I am {x}.", "Hi! My name is {x}.", "Hello! I'm {x}.",
              "Hi, I'm {x}. Nice to meet you.", "Hey, {x} here.")  # fmt: skip
_ASK_NAME = ("What is my name?", "What's my name?", "Do you remember my name?", "Who am I?", "what is my name",
             "Can you tell me my name?", "Do you know my name?", "What am I called?", "Tell me my name.",
             "Say my name.")  # fmt: skip
_DECORATIONS = ("Okay. {x}", "And {y}", "Please tell me: {y}", "One question: {y}", "So, {y}", "{x} Please.")


@dataclass(frozen=True)
class _Memory:
    """Something the user can tell and ask for later; `{x}` is its value."""

    kinds: tuple[str, ...]  # of its value, see _value
    tell: tuple[str, ...]
    ask: tuple[str, ...]
    noted: str
    answer: str
    untold: str


def _favourite(thing: str, kinds: tuple[str, ...]) -> _Memory:
    return _Memory(
        kinds,
        (f"My favourite {thing} is {{x}}.", f"My favorite {thing} is {{x}}.", f"my favourite {thing} is {{x}}",
         f"The {thing} I like most is {{x}}.", f"I like {{x}} best of every {thing}.",
         f"Remember that my favourite {thing} is {{x}}."),
        (f"What is my favourite {thing}?", f"What is my favorite {thing}?", f"what's my favourite {thing}?",
         f"Which {thing} do I like most?", f"Do you remember my favourite {thing}?",
         f"Tell me my favourite {thing}.", f"Do you know which {thing} I like best?"),
        f"I will remember that your favourite {thing} is {{x}}.",
        f"Your favourite {thing} is {{x}}.",
        f"You have not told me your favourite {thing} yet.",
    )  # fmt: skip


_MEMORIES = (
    _favourite("colour", ("colour", "word")),
    _favourite("food", ("food", "word")),
    _favourite("animal", ("animal", "word")),
    _favourite("city", ("place",)),
    _favourite("book", ("title",)),
    _favourite("hobby", ("hobby", "word")),
    _favourite("number", ("number",)),
    _Memory(("place",),
            ("I live in {x}.", "i live in {x}", "My home is in {x}.", "I moved to {x} last year.",
             "My home town is {x}.", "I am from {x}."),
            ("Where do I live?", "where do i live", "Do you remember where I live?", "In which city do I live?",
             "Which city is my home?", "Where am I from?"),
            "I will remember that you live in {x}.", "You live in {x}.", "You have not told me where you live yet."),
    _Memory(("number",),
            ("I am {x} years old.", "I'm {x} years old.", "My age is {x}.", "I am {x}, by the way."),
            ("How old am I?", "What is my age?", "Do you remember how old I am?", "how old am i"),
            "I will remember that you are {x} years old.", "You are {x} years old.",
            "You have not told me your age yet."),
    *(_Memory(("name",),
              (f"My {pet} is called {{x}}.", f"I have a {pet}. Its name is {{x}}.", f"I have a {pet} called {{x}}.",
               f"The name of my {pet} is {{x}}.", f"My {pet}'s name is {{x}}."),
              (f"What is my {pet} called?", f"What is the name of my {pet}?", f"Do you remember my {pet}'s name?",
               f"What's my {pet}'s name?", f"How is my {pet} called?"),
              f"I will remember that your {pet} is called {{x}}.", f"Your {pet} is called {{x}}.",
              f"You have not told me about your {pet} yet.")
      for pet in ("dog", "cat", "horse", "parrot")),
)  # fmt: skip

_UNKNOWN_QUESTIONS = (
    "What is the capital of {Place}?", "Who is {Name}?", "Who won the game yesterday?", "What time is it?",
    "What is the weather like?", "How tall is the {noun}?", "What is a {word}?", "How many {noun}s are in {Place}?",
    "When was {Name} born?", "Where is {Place}?", "Why is the {noun} {adjective}?", "How do I make a {noun}?",
    "Write a poem about a {noun}.", "What does {word} mean?", "Who wrote {Name}?", "Can you buy me a {noun}?",
    "What is the price of a {noun}?", "How far is {Place} from here?", "Is the {noun} {adjective}?",
    "Translate {word} into French.", "What is the best {noun}?", "Who invented the {noun}?",
    "How old is {Name}?", "Give me a recipe with {food}.", "Where can I find a {animal}?", "What day is it today?",
    "How much does a {animal} weigh?", "What do you think about {noun}s?", "Explain the {noun} to me.",
    "Which {noun} should I buy?", "What happened in {year}?", "Where did I put my {noun}?",
)  # fmt: skip


@dataclass
class Conversation:
    """What was said, and the state that decides the next right answer."""

    system: str | None
    user_turns: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    name: str | None = None
    told: dict[int, str] = field(default_factory=dict)  # number in _MEMORIES: value

    def messages(self) -> list[Message]:
        """The whole conversation as the API takes it."""
        result = [Message(role="system", content=self.system)] if self.system else []
        for user, answer in zip(self.user_turns, self.answers, strict=True):
            result += [Message(role="user", content=user), Message(role="assistant", content=answer)]
        return result


def conversation(rng: random.Random, held_out: bool = False, n_turns: int | None = None) -> Conversation:
    """A conversation of 1 to 9 turns; held_out draws names and invented words never trained on."""
    talk = Conversation(rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.5 else None)
    for _ in range(n_turns or rng.choice((1, 2, 3, 4, 4, 5, 6, 7, 8, 9))):
        user, answer = turn(rng, talk, held_out)
        talk.user_turns.append(user)
        talk.answers.append(answer)
    return talk


def sums(rng: random.Random) -> Conversation:
    """A conversation of 3 to 8 sums of single digits."""
    talk = Conversation(None)
    for _ in range(rng.randint(3, 8)):
        user, answer = _sum(rng)
        talk.user_turns.append(user)
        talk.answers.append(answer)
    return talk


def turn(rng: random.Random, talk: Conversation, held_out: bool) -> tuple[str, str]:
    kind = rng.random()
    first = not talk.user_turns
    if kind < (0.25 if first else 0.02):
        named = f"Hello {talk.name}! How can I help you?" if talk.name else "Hello! How can I help you?"
        return rng.choice(_GREETINGS), named
    if kind < (0.5 if first else 0.10):
        talk.name = words.first_name(rng, held_out)
        if rng.random() < 0.1:
            talk.name += " " + words.last_name(rng, held_out)
        return rng.choice(_TELL_NAME).format(x=talk.name), f"Hello {talk.name}! Nice to meet you."
    if kind < 0.58:
        return _memory_turn(rng, talk, held_out)
    if kind < 0.68:
        known = f"Your name is {talk.name}." if talk.name else "You have not told me your name yet."
        return dressed(rng, rng.choice(_ASK_NAME)), known
    if kind < 0.77:
        return _sum(rng)
    if kind < 0.83:
        country = rng.choice(list(_CAPITALS))
        question = rng.choice(_CAPITAL_QUESTIONS).format(x=country)
        return dressed(rng, question), f"The capital of {country} is {_CAPITALS[country]}."
    if kind < 0.92:
        questions, answer = rng.choice(_FACTS)
        return dressed(rng, rng.choice(questions)), answer
    if kind < 0.97:
        return dressed(rng, _unknown(rng, held_out)), UNKNOWN
    return rng.choice(_GOODBYES), f"Goodbye {talk.name}!" if talk.name else "Goodbye!"


def _memory_turn(rng: random.Random, talk: Conversation, held_out: bool) -> tuple[str, str]:
    """Tell something, or ask for something: usually what was told, sometimes what was not."""
    if talk.told and rng.random() < 0.6:
        n = rng.choice(list(talk.told)) if rng.random() < 0.85 else rng.randrange(len(_MEMORIES))
        memory = _MEMORIES[n]
        answer = memory.answer.format(x=talk.told[n]) if n in talk.told else memory.untold
        return dressed(rng, rng.choice(memory.ask)), answer
    n = rng.randrange(len(_MEMORIES))
    memory = _MEMORIES[n]
    if n not in talk.told and rng.random() < 0.2:
        return dressed(rng, rng.choice(memory.ask)), memory.untold
    talk.told[n] = _value(rng, rng.choice(memory.kinds), held_out)
    return rng.choice(memory.tell).format(x=talk.told[n]), memory.noted.format(x=talk.told[n])


def _value(rng: random.Random, kind: str, held_out: bool) -> str:
    invented = words.invented(rng, held_out)
    if kind == "number":
        return str(rng.randint(2, 99))
    if kind == "place":
        return rng.choice(words.CITIES) if rng.random() < 0.5 and not held_out else invented.capitalize()
    if kind == "name":
        return words.first_name(rng, held_out)
    if kind == "title":
        return f"{rng.choice(words.ADJECTIVES).capitalize()} {invented.capitalize()}"
    lists = {"colour": words.COLOURS, "food": words.FOODS, "animal": words.ANIMALS, "hobby": words.HOBBIES}
    return rng.choice(lists[kind]) if kind in lists else invented


def _sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    if rng.random() < 0.3:
        a, b = max(a, b), min(a, b)
        sign, spoken, result = "-", "minus", a - b
    else:
        sign, spoken, result = "+", "plus", a + b
    template = rng.choice(
        ("What is {a} {sign} {b}?", "What is {a} {spoken} {b}?", "{a} {sign} {b}", "How much is {a} {sign} {b}?",
         "{a}{sign}{b}", "How much is {a} {spoken} {b}?", "{a} {sign} {b} = ?", "Compute {a} {sign} {b}.",
         "what is {a}{sign}{b}", "Can you compute {a} {spoken} {b}?", "What's {a} {sign} {b}?")
    )  # fmt: skip
    return template.format(a=a, b=b, sign=sign, spoken=spoken), f"{a} {sign} {b} is {result}."


def _unknown(rng: random.Random, held_out: bool) -> str:
    question = rng.choice(_UNKNOWN_QUESTIONS)
    return question.format(
        Place=words.invented(rng, held_out).capitalize(), Name=words.invented(rng, held_out).capitalize(),
        noun=rng.choice(words.NOUNS), word=words.invented(rng, held_out), adjective=rng.choice(words.ADJECTIVES),
        food=rng.choice(words.FOODS), animal=rng.choice(words.ANIMALS), year=rng.randint(1200, 2030),
    )  # fmt: skip


def dressed(rng: random.Random, question: str) -> str:
    """The question as it is, or with the small words and slips people use."""
    kind = rng.random()
    if kind < 0.7:
        return question
    if kind < 0.8:
        return rng.choice(_DECORATIONS).format(x=question, y=question[0].lower() + question[1:])
    if kind < 0.9:
        return question.rstrip("?.!")
    return question[0].lower() + question[1:]
