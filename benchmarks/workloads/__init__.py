"""The workloads of the `auto` suite, by theme; a new one is added to the ``WORKLOADS`` of a theme's file.

Tasks stand at module level, so that they pickle, and every random state is fixed. This file imports nothing: a
worker that imports a task imports what the task's file needs, as with a user's own module, and not every theme.
"""
