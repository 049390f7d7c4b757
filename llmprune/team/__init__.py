"""The processes of one run: who belongs to them, what they tell each other, and how they notice that one is gone."""
