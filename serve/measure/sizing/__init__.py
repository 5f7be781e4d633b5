"""How many servers a load needs: simulated, and one of them measured beside it."""
