"""What differs between online search engines: address, credentials, the shape of a request and of an answer.

Wire formats as documented by the services. Google: GET /customsearch/v1 with `cx`, `q`, `num` and the key in the
`X-Goog-Api-Key` header; `items[]` with `title`, `link`, `snippet`. SerpAPI: GET /search.json with `engine`, `q`,
`api_key`; `organic_results[]` with the same three. An engine's answer is untrusted: it is checked field by field.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from rex_rag.retrieval.online.cache import Hit
from rex_rag.support.politeness import PassingTrouble
from rex_rag.support.wording import shorten

RESULTS_PER_SEARCH = 10  # both engines' default page, and the most that Google's gives


class TooManySearches(PassingTrouble):
    """The engine was asked more often than it allows at once."""


class UnusableAnswer(Exception):
    """An answer that is not of the documented shape."""


class SearchEngine(ABC):
    """One online engine. `variables` names the environment variables it needs and what belongs there."""

    name: ClassVar[str]
    title: ClassVar[str]
    address: ClassVar[str]
    path: ClassVar[str]
    key_variable: ClassVar[str]
    variables: ClassVar[Mapping[str, str]]

    def parameters(self) -> dict[str, Any]:
        """What an answer depends on besides query and account."""
        return {"num": RESULTS_PER_SEARCH}

    def source(self, credentials: Mapping[str, str]) -> str | None:
        """What tells this account's answers from another's; `None` where they do not differ."""
        return None

    @abstractmethod
    def request(self, query: str, credentials: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
        """Return (URL parameters, headers)."""

    @abstractmethod
    def read(self, answer: Mapping[str, Any]) -> list[Hit]:
        """The hits of a successful answer.

        Raises:
            UnusableAnswer, PassingTrouble: for one that neither holds hits nor says that there are none.
        """

    @abstractmethod
    def read_error(self, answer: Any) -> tuple[str, bool]:
        """From the body of a 4xx or 5xx: (what the engine says, whether a limit for a day or month is used up)."""


class GoogleSearch(SearchEngine):
    """Google Programmable Search through the Custom Search JSON API.

    Google has closed the API to new customers and announced its end for 1 January 2027.
    """

    name = "google"
    title = "Google Programmable Search"
    address = "https://customsearch.googleapis.com"
    path = "/customsearch/v1"
    key_variable = "GOOGLE_API_KEY"
    variables: ClassVar[Mapping[str, str]] = {
        "GOOGLE_API_KEY": "an API key of a Google Cloud project with the Custom Search API enabled",
        "GOOGLE_CSE_ID": "the ID (cx) of a Programmable Search Engine",
    }

    def source(self, credentials: Mapping[str, str]) -> str | None:
        return credentials.get("GOOGLE_CSE_ID")

    def request(self, query: str, credentials: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
        parameters = {"cx": credentials["GOOGLE_CSE_ID"], "q": query, **self.parameters()}
        return parameters, {"X-Goog-Api-Key": credentials["GOOGLE_API_KEY"]}

    def read(self, answer: Mapping[str, Any]) -> list[Hit]:
        if "items" not in answer and isinstance(answer.get("searchInformation"), dict):
            return []
        return _hits(answer.get("items"), "items")

    def read_error(self, answer: Any) -> tuple[str, bool]:
        error = answer.get("error") if isinstance(answer, dict) else None
        if not isinstance(error, dict):
            return "", False
        said = str(error.get("message", ""))
        reasons = {entry.get("reason") for entry in error.get("errors") or [] if isinstance(entry, dict)}
        return said, bool(reasons & {"dailyLimitExceeded", "quotaExceeded"}) or "per day" in said.lower()


class SerpAPISearch(SearchEngine):
    """Google's result page through SerpAPI."""

    name = "serpapi"
    title = "SerpAPI"
    address = "https://serpapi.com"
    path = "/search.json"
    key_variable = "SERPAPI_API_KEY"
    variables: ClassVar[Mapping[str, str]] = {"SERPAPI_API_KEY": "the private API key of a SerpAPI account"}

    def parameters(self) -> dict[str, Any]:
        # Without `num`, which Google no longer heeds, and which made result pages come back empty when it did.
        return {"engine": "google"}

    def request(self, query: str, credentials: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
        return {**self.parameters(), "q": query, "api_key": credentials["SERPAPI_API_KEY"]}, {}

    def read(self, answer: Mapping[str, Any]) -> list[Hit]:
        metadata = answer.get("search_metadata")
        status = metadata.get("status") if isinstance(metadata, dict) else None
        if status in ("Error", "Processing", "Queued"):
            raise PassingTrouble(f"search status {status}: {shorten(answer.get('error', ''), 200)}")
        # With status Success, a missing list means that the engine had no result for the query.
        if status == "Success" and "organic_results" not in answer:
            return []
        return _hits(answer.get("organic_results"), "organic_results")

    def read_error(self, answer: Any) -> tuple[str, bool]:
        said = str(answer.get("error", "")) if isinstance(answer, dict) else ""
        return said, "run out of searches" in said.lower()


ENGINES: dict[str, type[SearchEngine]] = {engine.name: engine for engine in (GoogleSearch, SerpAPISearch)}


def _hits(results: Any, field: str) -> list[Hit]:
    if not isinstance(results, list):
        raise UnusableAnswer(f"no list under {field!r}: {shorten(results)}")
    hits: dict[str, Hit] = {}
    for result in results:
        fields = result if isinstance(result, dict) else {}
        title, link, snippet = (_clean(fields.get(name)) for name in ("title", "link", "snippet"))
        # A page without a description still has its title to show; one without an address cannot be told from others.
        if link and (snippet or title):
            hits.setdefault(link, Hit(title, link, snippet or title))
    if results and not hits:
        raise UnusableAnswer(
            f"none of {len(results)} entries of {field!r} has a link and a text: {shorten(results[0], 200)}"
        )
    return list(hits.values())


def _clean(value: Any) -> str:
    """One line of text that a tokenizer can encode; anything but text counts as none."""
    return " ".join(value.encode("utf-8", "replace").decode("utf-8").split()) if isinstance(value, str) else ""
