"""What both engines share when they answer: grammars, how a token is chosen, one row's state, and the batch's schedule."""
