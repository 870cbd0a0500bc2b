"""Changes a message as no editor of bytes would: another value in one field, an item more or less, two fields of the same type swapped."""
from __future__ import annotations

from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

NUMBERS = [0, 1, -1, 2, 3, 5, 7, 255, 2**16, 2**20, 2**24, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, -2**31, -2**63]
REALS = [0.0, 1.0, -1.0, 0.5, 1e-45, 3e38, float("inf"), float("nan")]
MOST = 300                                              # fields of a message that items are added to


def mutate(message: Message, random: Random, words: list[str]) -> None:
    """Change one to three places of the message; texts come from `words` or from elsewhere in it."""
    for _ in range(random.randint(1, 3)):
        places = _places(message, random)
        named = [place for place in places if place[1].type == FieldDescriptor.TYPE_STRING]
        texts = words + [text for place in named for text in _values(*place)]
        owner, field = random.choice(places)
        _change(owner, field, random, texts, len(places) < MOST)


def _places(message: Message, random: Random) -> list[tuple[Message, FieldDescriptor]]:
    """Every field that is set in the message or in one inside it, and for each message two that may not be."""
    found = []
    for field, value in message.ListFields():
        found.append((message, field))
        if field.message_type:
            for item in value if hasattr(value, "add") else [value]:
                found += _places(item, random)
    fields = list(message.DESCRIPTOR.fields)
    return found + [(message, field) for field in random.sample(fields, min(2, len(fields)))]


def _values(owner: Message, field: FieldDescriptor) -> list[Any]:
    value = getattr(owner, field.name)
    return list(value) if hasattr(value, "extend") else [value]


def _value(field: FieldDescriptor, random: Random, texts: list[str]) -> Any:
    if field.enum_type:
        return random.choice(list(field.enum_type.values_by_number))
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return random.random() < 0.5
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return random.choice(REALS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return random.randbytes(random.choice([0, 1, 3, 12]))
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return random.choice(texts)
    return random.choice(NUMBERS)


def _change(owner: Message, field: FieldDescriptor, random: Random, texts: list[str], grow: bool) -> None:
    target = getattr(owner, field.name)
    try:
        if random.random() < 0.15:
            owner.ClearField(field.name)
        elif hasattr(target, "extend"):
            if len(target) and random.random() < 0.3:
                del target[random.randrange(len(target))]
            elif not field.message_type and len(target) and random.random() < 0.6:
                target[random.randrange(len(target))] = _value(field, random, texts)
            elif grow and field.message_type:
                target.add().CopyFrom(random.choice(target))
            elif grow:
                target.append(_value(field, random, texts))
        elif field.message_type:
            target.SetInParent()
        else:
            setattr(owner, field.name, _value(field, random, texts))
    except ValueError:
        return                                          # a number that the field cannot hold: another try comes soon
