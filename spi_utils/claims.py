"""x"""

from typing import Any


def audit(evaluation: Any) -> list:
    """x"""
    return []
