"""Looking at data and results. The trainers import nothing from here."""
