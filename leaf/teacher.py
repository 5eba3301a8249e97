"""Placeholder until the cache is merged."""


class TeacherCache: ...
