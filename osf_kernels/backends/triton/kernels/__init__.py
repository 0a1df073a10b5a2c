"""The device code, one kernel family a file. Imports triton, so import it lazily."""
