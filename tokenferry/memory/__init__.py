"""What peers can see: the symmetric heap and what it is made of."""
