"""Small stand-ins for the registry packages, in the packages' own formats."""

import json

import pytest

from hasten import packages

TOPICS = ("bread", "rivers", "violins", "snow", "chess", "planets", "gardens", "trains", "cheese", "mountains")


def conversation(number: int) -> dict[str, object]:
    """Two people, three turns; the first sends two messages in a row."""
    topic, name = TOPICS[number % len(TOPICS)], f"{number:03}"  # one width: no name begins another

    def message(sender: str, text: str) -> dict[str, str]:
        return {"sender": f"person-{sender}-{number}", "timestamp": "2018-05-02T19:38:15Z", "text": text}

    first = [message("x", f"hello number {name}"), message("x", f"do you like {topic}?")]
    second = [message("y", f"yes  I like {topic} of kind {name}\nvery much")]
    third = [message("x", f"then let us talk about {topic} until evening {name}")]
    return {"messages": [first, second, third], "start": "2018-05-10T04:05:48Z"}


def chitchat(count: int) -> bytes:
    lonely = {"messages": [[{"sender": "z", "timestamp": "t", "text": "anyone?"}]], "start": "s"}
    return json.dumps({"lonely": lonely, **{f"c{n}": conversation(n) for n in range(count)}}).encode()


def install(monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes]) -> None:
    """Make `Package.read` answer from `members` instead of from archives."""
    monkeypatch.setattr(packages.Package, "read", lambda self, member: members[member])
