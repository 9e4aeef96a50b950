"""An HTML page parsed for tests: its tags, attributes and text."""

import html.parser
import re


class Page(html.parser.HTMLParser):
    """Parses a page. `open`: tags that were not closed; `tags`: (tag, attributes) in order; `text`: the text, spaces collapsed."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        """The attributes of every such tag, in order."""
        return [attributes for name, attributes in self.tags if name == tag]

    def part(self, start: str, end: str) -> str:
        """The text between two strings."""
        return self.text.split(start, 1)[1].split(end, 1)[0]
