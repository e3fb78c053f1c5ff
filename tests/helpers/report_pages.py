"""Reads the page of a report."""

import html.parser


class Page(html.parser.HTMLParser):
  """Collects a page's images, cells, and whatever points somewhere."""

  def __init__(self, text):
    super().__init__()
    self.images, self.links, self.tags, self.rows = [], [], set(), []
    self._open = False
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    attributes = dict(attrs)
    self.tags.add(tag)
    if tag == "img":
      self.images.append(attributes["src"])
    for name in ("href", "src", "srcset", "data", "action", "poster"):
      if name in attributes and tag != "img":
        self.links.append(attributes[name])
    if tag == "tr":
      self.rows.append([])
    if tag in ("td", "th"):
      self._open = True
      self.rows[-1].append("")

  def handle_endtag(self, tag):
    self._open = self._open and tag not in ("td", "th")

  def handle_data(self, data):
    if self._open:
      self.rows[-1][-1] += data
