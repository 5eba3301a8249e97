"""Dispatch, checks and launch plumbing. Knows torch and Triton; no mathematics lives here."""
