"""Makes the mpt-tiny family: tokenizer, base, and the three finetunes, each scored, written to `mpt/tiny/`.

Every stage is a run in a folder of its own under the work folder, so an interrupted `train tiny` goes on where it was.
"""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from training import vocabulary
from training.corpora import chat, novels, yaml_json

_CHARACTERS_PER_NOVEL = 200_000
_DOCUMENTS = 4000  # generated ones of each kind; with the novels, 6 MB


def make_tokenizer(folder: Path) -> Path:
    """The family's tokenizer, trained unless it is already there."""
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        vocabulary.train(_texts(), vocab_size=2048).save(partial)
        partial.rename(folder)
    return folder


def _texts() -> Iterator[str]:
    for path in novels.training_files():
        yield novels.read(path)[:_CHARACTERS_PER_NOVEL]
    for number in range(_DOCUMENTS):
        pair = yaml_json.pair(random.Random(number))
        yield f"{pair.yaml}\n\n{pair.json}"
        yield "\n".join(message["content"] for message in chat.conversation(random.Random(number)).messages())
