// Products with a frozen weight in integer codes, by the engines.
#include "engine.h"
#include "integer.h"

FT_PRODUCTS(integer, finetune::Integer, finetune::integer_panel)
