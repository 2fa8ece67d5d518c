"""Values of every kind that people write in YAML: what JSON will say, a string, a number, a boolean or None.

A value that YAML writes otherwise than JSON, such as `1.10` or `~`, is `Spelled`. Whether a string needs quotes is for
the writer to see.
"""

# ruff: noqa: E501, SIM905

import random
import string
from collections.abc import Callable
from typing import Any, Literal

from training.corpora.yaml_documents.core_schema import Spelled, core_number
from training.corpora.yaml_documents.words import Shelf, Words

_PICTURES = "🎉🚀✅❌⚠🔥💡📦🐳🌍😀👍❤★☆→←↑↓•…°€£¥§©®™±×÷µ½²³"
_LINKS = ("/", "-", "_", ".", ":", "+", "@", "=")


# In what a document is hard: in its shape, which few and short words leave the most room for; in that and its depth, from
# which it ends at once; in that and lists of words and maps, keys without a value, lines turned into comments; in telling
# strings from numbers; in numbers and amounts side by side; in decimals, whose last noughts JSON drops; in what must be
# escaped, or is a sign elsewhere; in backslashes and quotes; or in all of it a little.
Hard = Literal["all", "shape", "depth", "mixed", "numbers", "amounts", "prices", "signs", "escapes"]


class Values(Words):
    """Words, and values made of them; a document has its own kinds of strings."""

    def __init__(self, rng: random.Random, shelf: Shelf, hard: Hard = "all") -> None:
        super().__init__(rng, shelf)
        self.hard: Hard = hard
        self.has_few = hard in ("shape", "depth", "mixed")
        if self.has_few:
            self.keep_to_few()
        kinds = _HARD_KINDS.get(hard, _KINDS)
        self._makers, weights = zip(*kinds, strict=True)
        few = [weight * rng.choice((0, 1, 1, 4)) for weight in weights]
        self._weights = few if sum(few) else list(weights)

    def kind(self) -> Callable[[], str]:
        """What draws strings of one of the document's kinds."""
        (maker,) = self.rng.choices(self._makers, self._weights)
        return lambda: maker(self)

    def string(self) -> str:
        """A string of any of the document's kinds."""
        return self.kind()()

    def value(self) -> Any:
        """A value of any kind."""
        rng = self.rng
        if self.hard == "mixed" and (kind := rng.random()) < 0.14:
            return None if kind < 0.06 else _template(self)
        if self.hard == "amounts" and rng.random() < 0.4:
            return rng.choice((number, few_digits, unusual_number, scientific))(rng)
        if self.hard == "prices" and rng.random() < 0.5:
            return decimal(rng)
        if self.has_few and rng.random() < 0.75:
            return self.word() if rng.random() < 0.75 else few_digits(rng)
        if self.hard == "numbers" and rng.random() < 0.3:
            return unusual_number(rng) if rng.random() < 0.5 else round_number(rng)
        kind = rng.random()
        if kind < 0.58:
            return self.string()
        if kind < 0.78:
            return number(rng)
        if kind < 0.88:
            return truth(rng)
        if kind < 0.94:
            return nothing(rng)
        return rng.choice((EMPTY_MAP, EMPTY_LIST, "")) if rng.random() < 0.35 else unusual_number(rng)


EMPTY_MAP, EMPTY_LIST = Spelled({}, "{}"), Spelled([], "[]")


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


def few_digits(rng: random.Random) -> int:
    """A number that others of its document are like."""
    return rng.randint(0, rng.choice((1, 9, 99)))


def round_number(rng: random.Random) -> int:
    """A number that ends in noughts, of which copying must not lose count."""
    return rng.randint(1, 10 ** rng.randint(1, 4)) * 10 ** rng.randint(1, 7)


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


def decimal(rng: random.Random) -> Spelled:
    """A price, a rate, a length: 3.80, 12.00, 0.5, 1.125."""
    ends = (
        "0",
        "5",
        "50",
        "50",
        "80",
        "20",
        "10",
        "00",
        "90",
        "99",
        "25",
        "75",
        f"{rng.randint(0, 99):02d}",
        f"{rng.randint(0, 999)}",
        "500",
    )
    text = f"{rng.randint(0, rng.choice((0, 9, 9, 99, 999, 9999)))}.{rng.choice(ends)}"
    return Spelled(core_number(text), text)


def scientific(rng: random.Random) -> Spelled:
    """A number with an exponent: 1e3, 2.5E-4, 1.25e+06."""
    mantissa = rng.choice(
        (str(rng.randint(1, 9)), f"{rng.randint(1, 9)}.{rng.randint(1, 99)}", f"-{rng.randint(1, 9)}.5")
    )
    exponent = rng.randint(-9, 12)
    sign = "-" if exponent < 0 else rng.choice(("", "", "+"))
    text = f"{mantissa}{rng.choice('eeeE')}{sign}{rng.choice(('', '', '0'))}{abs(exponent)}"
    return Spelled(core_number(text), text)


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


def _round(w: Words) -> str:
    """Noughts and equal digits: 1000m, 86400s, 0.0.0.0, 100000, 1.000.000."""
    rng = w.rng
    amount = round_number(rng)
    return rng.choice(
        (
            f"{amount}{rng.choice(('s', 'm', 'ms', 'Mi', 'k', '%', ' km'))}",
            f"{w.word()}={amount}",
            f"{amount:,}",
            str(amount),
            ".".join(str(rng.choice((0, 0, 1, 10, 127, 255, 255))) for _ in range(4)),
            f"{rng.choice((0, 1, 10))}.{rng.choice((0, 1, 10))}.{rng.choice((0, 0, 1, 10))}",
            f"{amount}:{rng.choice((amount, round_number(rng)))}",
        )
    )


_LIKE_NUMBERS: tuple[tuple[Callable[[Words], str], float], ...] = (
    (Words.word, 4), (_date, 8), (_time, 6), (_moment, 3), (_measure, 12), (_version, 14), (_network, 4), (_ports, 5), (_cron, 1),
    (_phone, 6), (_hash, 3), (_other, 16), (_answer, 5), (_code, 12), (_money, 6), (_round, 10),
)  # fmt: skip
_WITH_SIGNS: tuple[tuple[Callable[[Words], str], float], ...] = (
    (Words.word, 4), (Words.phrase, 8), (Words.sentence, 4), (_path, 4), (_mount, 5), (_url, 8), (_image, 3), (_assignment, 5),
    (_command, 12), (_template, 8), (_sign, 20), (_quotes, 20), (_other, 3), (_email, 2), (_joined, 4),
)  # fmt: skip


def _amount(w: Words) -> str:
    """What begins as a number does and is none: 300 ml, 1/2, 16.x, 0.0.0.0, 10-12, 3rd, 5 min."""
    rng = w.rng
    n, few = rng.randint(0, rng.choice((9, 99, 999, 9999))), rng.randint(0, 9)
    units = (
        "ml g kg l cl dl cm mm km h min s days weeks cups tbsp tsp pieces rpm V W kWh MB GB TiB Mbps px % °C €".split()
    )
    unit = rng.choice(units) if rng.random() < 0.8 else w.word()
    return rng.choice((f"{n} {unit}", f"{n} {unit}", f"{n}{unit}", f"{n}.{few} {unit}", f"{few}/{rng.randint(2, 9)}", f"{few} 1/2 {unit}", f"{n}.x", f"{n}.{few}.x", f"{n}.*",
         f"{few}.{few}.{few}.{few}", f"{few}.{rng.randint(0, 30)}.{rng.randint(0, 30)}", f"{n}-{n + rng.randint(1, 9)}", f"{n}..{n + 2}", f"{n}:{few}", f"{n}{rng.choice(('st', 'nd', 'rd', 'th', 'x', 'k', 'm'))}",
         f"{n},{few}", f"{n}+", f"+{n} {n}", f"{n}e", f"{n}/{unit}", f"{few} x {few}", f"{n}.{few}.{few}-{w.word()}"))  # fmt: skip


def _backslashes(w: Words) -> str:
    """Paths of Windows, patterns, escapes that are meant as they stand."""
    rng = w.rng
    drive = rng.choice("CDE")
    return rng.choice((f"{drive}:\\{w.name()}\\{w.word()}", f"{drive}:\\{w.name()} {w.name()}\\{w.word()}.exe", f"\\\\{w.word()}\\{w.word()}", f"{w.word()}\\t{w.word()}", f"{w.word()}\\n{w.word()}", f"{w.word()}\\{w.word()}",
         f"^\\d{{{rng.randint(1, 9)}}}$", f"\\b{w.word()}\\b", f"^{w.word()}\\.{w.word()}$", f"[\\w.-]+@{w.word()}\\.{w.word()}", f"{w.word()}\\s+{w.word()}", "(\\d+)\\.(\\d+)", f"\\{w.word()}{{{w.word()}}}",
         f"{w.word()} \\\\ {w.word()}", f"{w.word()}\\", f"\\{w.word()}", f"\\u00e9 {w.word()}", f"{w.word()} \\\"{w.word()}\\\""))  # fmt: skip


def _lines_and_tabs(w: Words) -> str:
    """Line ends and tabs, which only double quotes can have in them."""
    rng = w.rng
    return rng.choice((f"{w.phrase()}\n", f"{w.word()}\n{w.word()}", f"{w.word()}\t{w.word()}", f"{w.phrase(3)}\n{w.phrase(3)}\n", f"\t{w.word()}", f"{w.word()}\r\n{w.word()}", f"{w.word()}:\n\t{w.word()}", f'{w.word()} "{w.word()}"\n'))  # fmt: skip


_WITH_AMOUNTS: tuple[tuple[Callable[[Words], str], float], ...] = (
    (Words.word, 6), (Words.phrase, 4), (_amount, 24), (_measure, 10), (_version, 8), (_network, 6), (_ports, 3), (_other, 6), (_date, 4),
    (_time, 4), (_round, 6), (_money, 4), (_code, 3), (_phone, 2),
)  # fmt: skip
_WITH_ESCAPES: tuple[tuple[Callable[[Words], str], float], ...] = (
    (Words.word, 6), (Words.phrase, 6), (Words.sentence, 3), (_backslashes, 24), (_lines_and_tabs, 8), (_quotes, 14), (_command, 8), (_path, 3),
    (_template, 5), (_sign, 8), (_other, 3),
)  # fmt: skip
_HARD_KINDS: dict[Hard, tuple[tuple[Callable[[Words], str], float], ...]] = {
    "numbers": _LIKE_NUMBERS,
    "amounts": _WITH_AMOUNTS,
    "signs": _WITH_SIGNS,
    "escapes": _WITH_ESCAPES,
}
