"""Words, phrases and values of every kind that people write in YAML, made so that only copying gets them right.

`Words` draws them: real words and sentences of the novels, words of configuration files, invented ones, and letters of
other scripts. A value is what JSON will say: a string, a number, a boolean or None; `Spelled` is one whose YAML is not
the usual one, such as `1.10` or `~`. Strings that need quotes (`is_plain` decides) get them from the writer,
`training/corpora/yaml_documents.py`.
"""

# ruff: noqa: E501, SIM905  (a hundred words in quotes of their own read worse)

import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from training.corpora import words

_TECHNICAL = (
    "name version image ports volumes services environment command build context args restart networks driver host port "
    "user password database cache queue worker server client proxy token secret config settings options logging level "
    "format path file folder mount read write timeout interval retries replicas resources limits memory cpu labels tags "
    "metadata spec template containers selector status type kind id key value default enabled disabled required steps jobs "
    "runs uses with if on push branches main develop stage deploy test lint release cron schedule matrix include exclude "
    "needs script install dependencies packages license author email description title summary paths get post put delete "
    "parameters schema properties items string integer number boolean object array responses content example url base api "
    "ref source target output input size width height color colour price amount currency total count rate date time start "
    "end from to city country street zip phone first last age address people members owner team role group list rules "
    "filters mode theme language locale zone region bucket index alias domain ssl cert debug verbose max min weight order"
).split()
_FOREIGN = "äöüßéèêàâçñóíúáõãåøæœłśżźćńčšžřěůýőűğışİÄÖÜÉÑÅØČŠŽ"
_SCRIPTS = tuple(  # some letters of each at a time, so that a document does not hold a thousand kinds
    "".join(chr(code) for code in range(first, last + 1) if chr(code).isalpha())
    for first, last in (
        (0x0391, 0x03C9), (0x0430, 0x044F), (0x0410, 0x045F), (0x05D0, 0x05EA), (0x0621, 0x064A), (0x0905, 0x0939), (0x0E01, 0x0E2E),
        (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x00C0, 0x017F), (0x1EA0, 0x1EF9),
    )
)  # fmt: skip
_PICTURES = "🎉🚀✅❌⚠🔥💡📦🐳🌍😀👍❤★☆→←↑↓•…°€£¥§©®™±×÷µ½²³"
_LINKS = ("/", "-", "_", ".", ":", "+", "@", "=")
_CAPITALISED = re.compile(r"[A-Z]")

# What YAML 1.2's core schema reads as something else than a string.
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOLEAN = re.compile(r"true|True|TRUE|false|False|FALSE")
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_NOT_FIRST = frozenset("-?:,[]{}#&*!|>'\"%@`")


@dataclass(frozen=True)
class Spelled:
    """A value and the one way its YAML is written, without quotes."""

    value: Any
    text: str


def is_plain(text: str, in_flow: bool = False) -> bool:
    """Whether YAML reads these characters without quotes as this very string."""
    if not text or text != text.strip() or not text.isprintable() or is_other(text):
        return False
    if text[0] in _NOT_FIRST and not (text[0] in "-?:" and len(text) > 1 and text[1] not in " ,[]{}"):
        return False
    if ": " in text or " #" in text or text.endswith(":") or text.startswith(("---", "...")):
        return False
    return not (in_flow and (text[0] == ":" or any(sign in text for sign in ",[]{}?")))


def is_other(text: str) -> bool:
    """Whether the core schema reads this text as null, a boolean or a number."""
    return any(pattern.fullmatch(text) for pattern in (_NULL, _BOOLEAN, _INTEGER, _FLOAT))


class Shelf:
    """The words and the running text that documents are made of: those of some novels."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [text.split() for text in texts]
        found = {word for text in texts for word in re.findall(r"[A-Za-zÀ-ž]+(?:['’-][a-z]+)?", text) if len(word) < 16}
        self.words = sorted(found)


class Words:
    """Draws words, phrases and values for one document; it returns to words it drew, as documents do."""

    def __init__(self, rng: random.Random, shelf: Shelf) -> None:
        self.rng = rng
        self._shelf = shelf
        self._drawn: list[str] = []
        self._returns = rng.choice((0.05, 0.2, 0.4))
        self._script = rng.choice(_SCRIPTS) if rng.random() < 0.07 else ""
        self._is_foreign = rng.random() < 0.12
        self._makers, weights = zip(*_KINDS, strict=True)
        few = [weight * rng.choice((0, 1, 1, 4)) for weight in weights]  # a document has its own kinds of values
        self._weights = few if sum(few) else list(weights)

    def word(self) -> str:
        """One word, without spaces."""
        rng = self.rng
        if self._drawn and rng.random() < self._returns:
            word = rng.choice(self._drawn)
            return word if rng.random() < 0.85 else _altered(rng, word)
        kind = rng.random()
        if self._script and kind < 0.7:
            word = "".join(rng.choice(self._script) for _ in range(rng.randint(1, 6)))
        elif kind < 0.45:
            word = rng.choice(self._shelf.words)
            if _CAPITALISED.match(word) and rng.random() < 0.5:
                word = word.lower()
        elif kind < 0.68:
            word = rng.choice(_TECHNICAL)
        elif kind < 0.84:
            word = words.invented(rng, False)
        elif kind < 0.94:
            word = "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(1, 8)))
        else:
            letters = string.ascii_letters if rng.random() < 0.5 else string.ascii_lowercase + string.digits
            word = "".join(rng.choice(letters) for _ in range(rng.randint(2, 10)))
        if self._is_foreign and rng.random() < 0.6:
            word = "".join(rng.choice(_FOREIGN) if rng.random() < 0.2 else letter for letter in word)
        word = word.replace("’", "'")
        self._drawn.append(word)
        return word

    def name(self) -> str:
        """A capitalised word."""
        word = self.word()
        return word[0].upper() + word[1:]

    def phrase(self, most: int = 5) -> str:
        """Some words, as a title or a name has them."""
        rng = self.rng
        parts = [self.word() for _ in range(rng.randint(1, most))]
        style = rng.random()
        if style < 0.3:
            parts = [part[0].upper() + part[1:] for part in parts]
        elif style < 0.5:
            parts[0] = parts[0][0].upper() + parts[0][1:]
        if len(parts) > 1 and rng.random() < 0.2:
            at = rng.randrange(1, len(parts))
            joint = rng.choice(
                (",", ",", " &", " -", " –", ":", ";", " and", " of the", " /", " +", "'s", ".", " #", " 2", " *", "!")
            )
            parts[at - 1] += joint
        text = " ".join(parts)
        ending = rng.random()
        if ending < 0.06:
            return text + rng.choice(".?!")
        if ending < 0.08:
            return f"{text} ({self.word()})"
        if ending < 0.1:
            return f'{text} "{self.word()}"'
        if ending < 0.14:
            return f"{text} {rng.randint(0, 999)}"
        return text

    def sentence(self, most: int = 24) -> str:
        """Running text of a novel, from any place in it."""
        rng = self.rng
        text = rng.choice(self._shelf.texts)
        at = rng.randrange(max(1, len(text) - most))
        found = " ".join(text[at : at + rng.randint(3, most)]).strip("-—–_* ")
        if rng.random() < 0.7:
            found = found.translate(str.maketrans("’‘“”", "''\"\""))
        if rng.random() < 0.5:
            found = found[:1].upper() + found[1:].rstrip(",;:") + rng.choice(("", ".", ".", "!", "?"))
        return found or "none"

    def identifier(self) -> str:
        """Words joined as names in programs are."""
        rng = self.rng
        joint = rng.choice("---__.")
        parts = [self.word().lower() for _ in range(rng.choice((1, 1, 2, 2, 3)))]
        if rng.random() < 0.15:
            parts.append(str(rng.randint(0, 99)))
        return joint.join(parts)

    def string(self) -> str:
        """A string of any kind; whether it needs quotes is for the writer to see."""
        (maker,) = self.rng.choices(self._makers, self._weights)
        text: str = maker(self)
        return text

    def value(self) -> Any:
        """A value of any kind."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.58:
            return self.string()
        if kind < 0.78:
            return number(rng)
        if kind < 0.88:
            return truth(rng)
        if kind < 0.94:
            return nothing(rng)
        return rng.choice((Empty.MAP, Empty.LIST, "")) if rng.random() < 0.35 else unusual_number(rng)


class Empty:
    """Empty collections, which are written in flow style."""

    MAP = Spelled({}, "{}")
    LIST = Spelled([], "[]")


def truth(rng: random.Random) -> Any:
    is_true = rng.random() < 0.5
    text = "true" if is_true else "false"
    return Spelled(is_true, rng.choice((text.capitalize(), text.upper()))) if rng.random() < 0.08 else is_true


def nothing(rng: random.Random) -> Any:
    return Spelled(None, rng.choice(("~", "Null", "null", "null"))) if rng.random() < 0.6 else None


def number(rng: random.Random) -> int | float:
    kind = rng.random()
    if kind < 0.3:
        return rng.randint(0, 99)
    if kind < 0.65:
        return rng.randint(0, 10 ** rng.randint(2, 9))
    if kind < 0.75:
        return -rng.randint(1, 10 ** rng.randint(1, 4))
    value = rng.randint(-1000 if kind > 0.95 else 0, 10 ** rng.randint(1, 6)) / 10 ** rng.randint(1, 4)
    return value if abs(value) >= 1e-4 or value == 0 else 0.25


def unusual_number(rng: random.Random) -> Spelled:
    """A number that JSON writes otherwise: 1.10, 007, +4, .5, 5., 0xFF, 1e3."""
    kind = rng.random()
    if kind < 0.45:
        text = f"{rng.randint(0, 9999)}.{rng.choice(('0', '00', '10', '20', '50', '30', '000', '90'))}"
    elif kind < 0.62:
        text = "0" * rng.randint(1, 2) + str(rng.randint(0, 10 ** rng.randint(1, 6)))
    elif kind < 0.7:
        text = f"+{rng.randint(0, 999)}"
    elif kind < 0.76:
        text = f".{rng.randint(1, 999):d}".rstrip("0")
    elif kind < 0.82:
        text = f"{rng.randint(0, 999)}."
    elif kind < 0.87:
        text = f"0x{rng.randint(0, 255):{rng.choice('xX')}}"
    elif kind < 0.9:
        text = f"0o{rng.randint(0, 0o777):o}"
    else:
        text = (
            f"{rng.choice(('1', '2', '3', '5', '1.5', '6.02', '-1'))}e{rng.choice('-+')}{rng.randint(1, 20)}".replace(
                "+", rng.choice(("+", ""))
            )
        )
    return Spelled(core_number(text), text)


def core_number(text: str) -> int | float:
    """The number that the core schema reads in a text that is one."""
    if text.startswith(("0o", "0x")):
        return int(text, 0)
    return int(text) if _INTEGER.fullmatch(text) else float(text)


def _altered(rng: random.Random, word: str) -> str:
    """A word that is almost another one, so that copying has to look."""
    if len(word) < 3 or rng.random() < 0.4:
        return word + rng.choice(("s", "2", "ed", "er", "-1", "_old"))
    at = rng.randrange(len(word))
    return word[:at] + word[at + 1 :] if rng.random() < 0.5 else word[:at] + word[at] + word[at:]


def _digits(rng: random.Random, least: int, most: int) -> str:
    return "".join(rng.choice(string.digits) for _ in range(rng.randint(least, most)))


def _date(w: Words) -> str:
    rng = w.rng
    year, month, day = rng.randint(1900, 2035), rng.randint(1, 12), rng.randint(1, 28)
    return rng.choice(
        (f"{year}-{month:02d}-{day:02d}",) * 5
        + (
            f"{day:02d}.{month:02d}.{year}",
            f"{month}/{day}/{year}",
            f"{year}-{month:02d}",
            f"{year}/{year % 100 + 1:02d}",
            f"{day} {w.name()} {year}",
        )
    )


def _time(w: Words) -> str:
    rng = w.rng
    hour, minute, second = rng.randint(0, 23), rng.randint(0, 59), rng.randint(0, 59)
    short = f"{hour:02d}:{minute:02d}"
    return rng.choice(
        (
            short,
            short,
            short,
            f"{short}:{second:02d}",
            f"{hour}:{minute:02d}",
            f"{short}-{(hour + 2) % 24:02d}:{minute:02d}",
        )
    )


def _moment(w: Words) -> str:
    rng = w.rng
    zone = rng.choice(("", "Z", "Z", f"+{rng.randint(0, 12):02d}:00", f"-{rng.randint(0, 12):02d}:00"))
    seconds = f":{rng.randint(0, 59):02d}" if rng.random() < 0.7 else ""
    return f"{rng.randint(1970, 2035)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}{rng.choice('TT ')}{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}{seconds}{zone}"


def _measure(w: Words) -> str:
    rng = w.rng
    units = (
        "s",
        "m",
        "h",
        "ms",
        "d",
        "G",
        "Gi",
        "Mi",
        "gb",
        "MB",
        "k",
        "px",
        "em",
        "%",
        " %",
        " km",
        " kg",
        " g",
        " ml",
        " V",
        " cups",
        "x",
        "st",
        "A",
        "b",
    )
    amount = str(rng.randint(0, 5000)) if rng.random() < 0.75 else f"{rng.randint(0, 99)}.{rng.randint(0, 9)}"
    text = amount + (rng.choice(units) if rng.random() < 0.85 else " " + w.word())
    return text if rng.random() < 0.85 else f"{text}{rng.choice(('', ' '))}{rng.randint(1, 59)}{rng.choice(units[:5])}"


def _version(w: Words) -> str:
    rng = w.rng
    numbers = ".".join(str(rng.randint(0, rng.choice((9, 30)))) for _ in range(rng.choice((2, 3, 3, 3, 4))))
    return (
        rng.choice(("", "", "", "v", "^", "~", ">=", "==", "~> ", "<"))
        + numbers
        + rng.choice(("", "", "", "", "-alpine", "-beta.1", "rc1", f"-{w.identifier()}", ", <9"))
    )


def _path(w: Words) -> str:
    rng = w.rng
    parts = [w.identifier() if rng.random() < 0.6 else w.word() for _ in range(rng.randint(1, 4))]
    start = rng.choice(("/", "/", "./", "../", "", "~/", "."))
    end = rng.choice(("", "", "/", ".yml", ".txt", ".py", ".sh", ".env", ".json", "/**", "/*.md"))
    return start + "/".join(parts) + end


def _mount(w: Words) -> str:
    return f"{_path(w)}:{_path(w)}{w.rng.choice(('', '', ':ro', ':rw'))}"


def _url(w: Words) -> str:
    rng = w.rng
    scheme = rng.choice(("https", "https", "http", "redis", "postgres", "mongodb", "amqp", "ws", "ssh"))
    user = f"{w.word()}:{w.word()}@" if rng.random() < 0.15 else ""
    host = w.identifier().replace("_", "-") + rng.choice((".com", ".org", ".net", ".io", "", ".example.com", ".ch"))
    port = f":{rng.randint(80, 65535)}" if rng.random() < 0.35 else ""
    path = "/" + "/".join(w.word() for _ in range(rng.randint(0, 3))) if rng.random() < 0.7 else ""
    query = (
        f"?{w.word()}={w.word()}" + rng.choice(("", f"&{w.word()}={rng.randint(0, 9)}", f"#{w.word()}"))
        if rng.random() < 0.12
        else ""
    )
    return f"{scheme}://{user}{host}{port}{path}{query}"


def _image(w: Words) -> str:
    rng = w.rng
    where = "/".join(w.identifier() for _ in range(rng.choice((1, 1, 2, 3))))
    tag = rng.choice(
        (
            "latest",
            "alpine",
            "stable",
            f"{rng.randint(1, 20)}",
            f"{rng.randint(0, 20)}.{rng.randint(0, 30)}",
            _version(w).lstrip("^~>=< ").split(",")[0],
            w.identifier(),
        )
    )
    return rng.choice((where, f"{where}:{tag}", f"{where}:{tag}", f"{where}@{tag}"))


def _variable(w: Words) -> str:
    return "_".join(w.word().upper() for _ in range(w.rng.randint(1, 3)))


def _assignment(w: Words) -> str:
    return f"{_variable(w)}={w.rng.choice((w.word(), str(w.rng.randint(0, 9999)), _path(w), 'true', _url(w)))}"


def _command(w: Words) -> str:
    rng = w.rng
    parts = [w.identifier()]
    for _ in range(rng.randint(1, 6)):
        parts.append(
            rng.choice(
                (
                    f"--{w.identifier()}",
                    f"--{w.identifier()}={w.word()}",
                    f"-{rng.choice(string.ascii_letters)}",
                    w.word(),
                    _path(w),
                    str(rng.randint(0, 9999)),
                    w.word(),
                    "&&",
                    "|",
                    f'"{w.word()}"',
                    f"${_variable(w)}",
                    "-",
                )
            )
        )
    return " ".join(parts)


def _option(w: Words) -> str:
    return w.rng.choice(
        (
            f"--{w.identifier()}",
            f"--{w.identifier()}={w.word()}",
            f"-{w.word()}",
            f"-{w.rng.choice(string.ascii_letters)} {w.word()}",
        )
    )


def _network(w: Words) -> str:
    rng = w.rng
    address = ".".join(str(rng.randint(0, 255)) for _ in range(4))
    return rng.choice(
        (
            address,
            address,
            f"{address}/{rng.choice((8, 16, 24, 32))}",
            f"{address}:{rng.randint(1, 65535)}",
            "::1",
            f"fe80::{rng.randint(1, 99)}",
        )
    )


def _ports(w: Words) -> str:
    rng = w.rng
    return f"{rng.randint(1, 65535)}:{rng.randint(1, 65535)}{rng.choice(('', '', '', '/tcp', '/udp'))}"


def _cron(w: Words) -> str:
    rng = w.rng
    return " ".join(rng.choice(("*", "*", str(rng.randint(0, 23)), f"*/{rng.randint(2, 30)}", "1-5")) for _ in range(5))


def _email(w: Words) -> str:
    return f"{w.word().lower()}{w.rng.choice(('', '.' + w.word().lower()))}@{w.word().lower()}.{w.rng.choice(('com', 'org', 'ch', 'io'))}"


def _phone(w: Words) -> str:
    rng = w.rng
    groups = rng.choice((" ", "-", "")).join(_digits(rng, 2, 4) for _ in range(rng.randint(2, 4)))
    return rng.choice(("", "+", "0", "+1 ", "(0)")) + groups


def _hash(w: Words) -> str:
    letters = w.rng.choice((string.hexdigits[:16], string.ascii_letters + string.digits))
    return "".join(w.rng.choice(letters) for _ in range(w.rng.choice((6, 8, 12, 20, 32))))


def _template(w: Words) -> str:
    inner = ".".join(w.word() for _ in range(w.rng.randint(1, 3)))
    form = w.rng.choice(
        ("${{{{ {} }}}}", "{{{{ {} }}}}", "${{{}}}", "${}", "{{{}}}", "%{}%", "{{{{.{}}}}}", "<{}>", "$({})")
    )
    text = form.format(inner)
    return w.rng.choice((text, text, f"{w.word()}-{text}", f"{text}/{w.word()}", f"{text} {w.word()}"))


def _sign(w: Words) -> str:
    """What would be something else at another place: a list, a comment, an anchor, an alias, a tag."""
    rng = w.rng
    return rng.choice(
        (f"{w.word()}: {w.word()}", f"#{w.word()}", f"#/{w.word()}/{w.word()}/{w.name()}", f"{w.word()} {rng.choice(_PICTURES)}", f"{rng.choice(_PICTURES)} {w.phrase(3)}", f"{rng.randint(0, 99)}{rng.choice(_PICTURES)}", f"{w.word()} #{rng.randint(1, 99)}", f"*{w.rng.choice(('', w.word(), '.py', '.' + w.word()))}", f"&{w.word()}",
         f"!{w.word()}", f"@{w.word()}/{w.word()}", f"- {w.word()}", f"{w.word()}:", f"[{w.word()}]", f"{{{w.word()}}}", "-", "?", "|", ">", f"> {w.word()}", f"%{w.word()}",
         f"`{w.word()}`", f"{rng.choice('RABC')}&{rng.choice('BDX')}", f"{w.word()} & {w.word()}", f"{rng.randint(2, 9)} * {rng.randint(2, 9)}", f"{w.word()} > {w.word()}", f"{w.word()} | {w.word()}",
         f"{w.word()}!", f"$.{w.word()}[{rng.randint(0, 9)}]", f"^{w.word()}.*$", f"{w.word()}::{w.word()}", f" {w.word()}", f"{w.word()}, {w.word()}", f"{w.word()} - {w.word()}", f"{w.word()}*", f"{w.word()}/{w.word()}@v{rng.randint(1, 9)}")
    )  # fmt: skip


def _quotes(w: Words) -> str:
    return w.rng.choice((f'{w.word()} "{w.word()}"', f'"{w.phrase()}" {w.word()}', f"{w.word()}'s {w.word()}", f"'{w.word()}' {w.word()}", f"{w.word()}\\{w.word()}", f"{w.word()}\\d+", f'{w.word()}="{w.word()}"', f"it's {w.word()}", f"{w.word()}.{w.word()} == '{w.word()}'", f"{w.word()} != \"{w.word()}\" && {w.word()}", f"{w.word()}\t{w.word()}", f"{w.word()}\n{w.word()}", f"{w.name()}'{w.word()}"))  # fmt: skip


def _other(w: Words) -> str:
    """A string that would be a number, a boolean or null without quotes."""
    rng = w.rng
    return rng.choice((str(rng.randint(0, 99999)), _digits(rng, 2, 8), f"{rng.randint(0, 30)}.{rng.randint(0, 30)}", f"{rng.randint(0, 30)}.{rng.randint(0, 30)}", "true", "false", "null", "~", "1e3", "", f"-{rng.randint(0, 9)}", "True", "0x1F"))  # fmt: skip


def _answer(w: Words) -> str:
    return w.rng.choice(
        "yes no on off y n Yes No ON Off YES NO none None N/A TBD nil NaN undefined any all auto always never".split()
    )


def _code(w: Words) -> str:
    rng = w.rng
    letters = "".join(rng.choice(string.ascii_uppercase) for _ in range(rng.randint(1, 4)))
    digits = _digits(rng, 1, 5)
    return rng.choice((letters + digits, digits + letters, f"{letters}-{digits}", f"{letters} {digits}", letters, f"{letters}{digits}{letters}", f"{digits}/{_digits(rng, 1, 3)}", f"{digits}-{digits}", f"{digits}{letters.lower()}", f"{rng.randint(1, 20)}:{rng.randint(1, 20)}", f"#{digits}"))  # fmt: skip


def _money(w: Words) -> str:
    rng = w.rng
    amount = f"{rng.randint(0, 9999)}.{rng.randint(0, 99):02d}"
    return rng.choice(
        (
            f"${amount}",
            f"€{amount}",
            f"{amount} €",
            f"{amount} CHF",
            f"{rng.randint(1, 9)},{rng.randint(100, 999)}",
            f"£{rng.randint(1, 900)}",
            f"1_000 {w.word()}",
        )
    )


def _joined(w: Words) -> str:
    joint = w.rng.choice(_LINKS)
    return joint.join(w.word() for _ in range(w.rng.randint(2, 4)))


_KINDS: tuple[tuple[Callable[[Words], str], float], ...] = (
    (Words.word, 16), (Words.name, 5), (Words.phrase, 22), (Words.sentence, 8), (Words.identifier, 9), (_joined, 4), (_date, 4), (_time, 2),
    (_moment, 1.5), (_measure, 5), (_version, 5), (_path, 6), (_mount, 3), (_url, 5), (_image, 4), (_variable, 2), (_assignment, 3), (_command, 6),
    (_option, 2), (_network, 1.5), (_ports, 3), (_cron, 1), (_email, 2), (_phone, 2), (_hash, 2), (_template, 3), (_sign, 6), (_quotes, 4),
    (_other, 6), (_answer, 3), (_code, 4), (_money, 1.5),
)  # fmt: skip
