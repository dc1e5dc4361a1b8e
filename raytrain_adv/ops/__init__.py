"""Operations that the libraries lack or do slower; a test compares each with what it replaces."""
