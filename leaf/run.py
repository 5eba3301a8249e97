"""The stages of a run over one directory."""

from __future__ import annotations
