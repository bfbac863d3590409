"""The JSON Schema of the four kinds of records, made from their models, for readers in other languages.

    python -m pipeline.records.json_schema > docs/record.schema.json

It has types, bounds and keys; what keys must agree on among each other is checked by the models alone.
"""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import Field, TypeAdapter

from pipeline.records.store import AnyRecord

__all__ = ["schema_text"]


def schema_text() -> str:
    """Of the files as they are written: every key is there."""
    adapter: TypeAdapter[AnyRecord] = TypeAdapter(Annotated[AnyRecord, Field(discriminator="kind")])
    return json.dumps(adapter.json_schema(mode="serialization"), indent=1) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
