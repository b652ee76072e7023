"""A generated set of requests to four tools, easy enough for a model of 135M parameters to get right in part."""

from __future__ import annotations

import random
from typing import Any

Row = dict[str, Any]
HELD_OUT = 32
SIZE = 320


def _tool(name: str, description: str, **properties: str) -> dict[str, Any]:
    typed = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": typed, "required": list(properties)}
    return {"name": name, "description": description, "parameters": parameters}


TOOLS = [
    _tool("weather", "Weather of a city", city="string"),
    _tool("timer", "Start a timer", minutes="integer"),
    _tool("play", "Play music", artist="string"),
    _tool("message", "Send a text", to="string", text="string"),
]
CITIES = ("Paris", "Rome", "Tokyo", "Cairo", "Lima", "Oslo", "Berlin", "Madrid", "Vienna", "Dublin", "Boston", "Delhi")
ARTISTS = ("Mozart", "Bach", "Queen", "Adele", "Prince", "Miles Davis", "Nina Simone", "Chopin", "Elvis", "Bowie")
PEOPLE = ("Ann", "Bob", "Carla", "David", "Emma", "Frank", "Grace", "Hugo")
TEXTS = ("I am late", "see you soon", "dinner is ready", "call me", "thank you", "good luck", "we won")
REQUESTS = {
    "weather": ("What is the weather in {city}?", "Is it raining in {city}?", "How warm is it in {city} today?"),
    "timer": ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes.", "Count down {minutes} minutes."),
    "play": ("Play something by {artist}.", "I want to hear {artist}.", "Put on some {artist}, please."),
    "message": ("Tell {to}: {text}.", "Send {to} the message: {text}.", "Text {to} that says: {text}."),
}
INTRODUCTION = (
    "Answer each request with one function call: weather(city), timer(minutes), play(artist) or message(to, text).\n\n"
)
SHOTS = (
    ("Is it sunny in Athens?", 'weather(city="Athens")'),
    ("Start a timer of 4 minutes.", "timer(minutes=4)"),
    ("Play a song of Vivaldi.", 'play(artist="Vivaldi")'),
    ("Write to Zoe: come home.", 'message(to="Zoe", text="come home")'),
)


def rows() -> tuple[list[Row], list[Row]]:
    """Disjoint train and held-out requests; always the same."""
    rng = random.Random(20260512)
    every: dict[str, Row] = {}
    while len(every) < SIZE + HELD_OUT:
        name = rng.choice(list(REQUESTS))
        values: dict[str, Any] = {
            "city": rng.choice(CITIES),
            "minutes": rng.randint(2, 60),
            "artist": rng.choice(ARTISTS),
            "to": rng.choice(PEOPLE),
            "text": rng.choice(TEXTS),
        }
        request = rng.choice(REQUESTS[name]).format(**values)
        arguments = {
            key: values[key] for key in next(t for t in TOOLS if t["name"] == name)["parameters"]["properties"]
        }
        every[request] = _row(request, {"name": name, "arguments": arguments})
    found = list(every.values())
    return found[HELD_OUT:], found[:HELD_OUT]


def _row(request: str, call: dict[str, Any]) -> Row:
    turns = [
        turn
        for question, answer in SHOTS
        for turn in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
    turns[0] = {**turns[0], "content": INTRODUCTION + turns[0]["content"]}
    return {"prompt": [*turns, {"role": "user", "content": request}], "tools": TOOLS, "answer": [call]}
