"""Instructor: answers of a type, by a call, by JSON and by a schema."""

import json
import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, ConfigDict

asked = json.load(sys.stdin)
client = openai.OpenAI(base_url=f"{asked['url']}/v1", api_key=asked["key"], max_retries=0)


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    color: Literal["red", "green"]


def answer(mode):
    ask = instructor.from_openai(client, mode=mode).chat.completions.create
    found = ask(model=asked["chat"], messages=asked["hello"], response_model=Answer, temperature=0, max_retries=0)
    return found.model_dump()


print(
    json.dumps(
        {
            "structured_by_call": answer(instructor.Mode.TOOLS),
            "structured": answer(instructor.Mode.JSON_SCHEMA),
        }
    )
)
