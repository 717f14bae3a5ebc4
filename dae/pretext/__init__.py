"""What it is learned from: the disruptions, the contrast, and the methods made of them."""
