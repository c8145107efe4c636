"""Limits on constraints that the router's check shares with the workers."""

MAX_LEXER_STATES = 50_000
"""They take 1 to 2 kB each and belong to one request."""
MAX_ROW_ITEMS = 10_000
"""Ways in which the grammar may go on at one place. A schema has some four for each property that may be left out; the
library's own limit, 2,000, is one of 500 properties."""
DEAR_S = 0.001
"""Masks that take more processor time on average are dear: others go before them. Good will takes 0.01 to 1 ms."""
MASK_S = 0.005
"""Processor time to find what may come next, on average."""
