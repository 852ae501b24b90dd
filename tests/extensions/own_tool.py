"""A tool of one's own: a function with type hints. Named in a recipe as `agent_tools: [search, own_tool:measure]`."""


def measure(text: str) -> int:
    """Count the letters of a text.

    Args:
        text: What to count.
    """
    return len(text)
